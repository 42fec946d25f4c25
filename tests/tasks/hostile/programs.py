"""Programs that attack the sandbox, the scorer or the verdict; none of them solves its task.

The task of all: ``solve(x)`` returns ``2 * x``. Words in capitals are filled in by the test: SENTINEL is a file that
must stay as it is, TOKEN is part of the name of every file that a program tries to leave, PORT is where a server of
the test listens, SCORER is the pid of the test.
"""

from __future__ import annotations

CHECK = "def check(candidate):\n    assert candidate(4) == 8\n    assert candidate(0) == 0\ncheck(solve)\n"

WRONG = "\ndef solve(x):\n    return None\n"

# ---- time, memory, processes, output, files: contained by either sandbox ----
GREEDY = {
    "endless loop": "while True: pass",
    "endless loop when called": "def solve(x):\n    while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "reading the input": "def solve(x):\n    return int(input()) or x",
    "ignoring SIGTERM and the rest": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "catching every exception": """
while True:
    try:
        while True: pass
    except BaseException: pass
""",
    "infinite generator": "import itertools\ndef solve(x):\n    return sum(1 for _ in itertools.count())",
    "regular expression that backtracks": "import re\ndef solve(x):\n    return re.match(r'(a+)+$', 'a' * 40 + 'b')",
    "large power": "def solve(x):\n    return 9 ** 9 ** 9",
    "memory hog": "hog = []\nwhile True: hog.append(bytearray(1 << 24))",
    "memory hog at once": "hog = bytearray(1 << 40)",
    "list that grows": "hog = [0]\nwhile True: hog += hog",
    "memory hogs side by side": """
import os, time
for _ in range(12): os.fork()
hog = []
try:
    while True: hog.append(bytearray(b'x' * (1 << 22)))
except MemoryError: time.sleep(1000)
""",
    "memory files": """
import os
held = []
while True:
    fd = os.memfd_create('hog')
    held.append(fd)
    os.ftruncate(fd, 1 << 22)
    os.write(fd, bytes(1 << 22))
""",
    "System V memory": """
import ctypes
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
while (number := libc.shmget(0, 64 << 20, 0o1600)) >= 0:
    ctypes.memset(libc.shmat(number, None, 0), 1, 64 << 20)
""",
    "shared memory of files": """
import itertools
for place in ('/dev/shm', '.'):
    try:
        for number in itertools.count():
            with open(f'{place}/{number}', 'wb') as file: file.write(bytes(1 << 22))
    except OSError: pass
raise MemoryError
""",
    "shared memory without a file": """
import mmap
held = []
while True:
    held.append(mmap.mmap(-1, 1 << 24))
    held[-1].write(bytes(1 << 24))
""",
    "memory of many small processes": """
import os, time
for _ in range(60):
    if os.fork() == 0:
        held = bytearray(b'x' * (1 << 24))
        time.sleep(1000)
time.sleep(1000)
""",
    "many processes that work in turn": """
import os, signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    if os.fork() == 0:
        for _ in range(10 ** 6): pass
        os._exit(0)
    try: os.wait()
    except OSError: pass
""",
    "not to be killed with its parent": """
import ctypes, os, time
for _ in range(3):
    os.fork()
    os.setsid() if os.getpid() != os.getsid(0) else None
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
time.sleep(1000)
""",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb that does not give up": """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    "zombie maker": """
import os
while True:
    if os.fork() == 0: os._exit(0)
""",
    "threads without end": """
import threading, time
while True: threading.Thread(target=time.sleep, args=(1000,)).start()
""",
    "thread that outlives the program": """
import threading, time
def spin():
    while True: time.sleep(0.01)
threading.Thread(target=spin).start()
"""
    + WRONG,
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: time.sleep(1)
    os._exit(0)
"""
    + WRONG,
    "daemon that works on": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(64):
            try: os.close(fd)
            except OSError: pass
        while True: pass
    os._exit(0)
os._exit(0)
""",
    "process pool": """
import multiprocessing
def solve(x):
    with multiprocessing.Pool(8) as pool: return pool.map(abs, range(10 ** 9))
""",
    "1 GB of output": "for _ in range(1 << 10): print('x' * (1 << 20))",
    "output without end": "import os\nwhile True: os.write(1, b'x' * 4096); os.write(2, b'y' * 4096)",
    "open files without end": "held = []\nwhile True: held.append(open('/dev/null'))",
    "large file": """
with open('large', 'wb') as file:
    while True: file.write(bytes(1 << 20))
""",
    "sparse file": "open('sparse', 'wb').truncate(1 << 40)",
    "many small files": "for i in range(100000): open(f'file{i}', 'w').write('x')",
    "deep recursion": "def solve(x):\n    return solve(x + 1)",
    "recursion without a limit": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef solve(x):\n    return solve(x + 1)",
    "syntax that nests deeply": "solve = " + "(" * 5000 + ")" * 5000,
    "segmentation fault": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "killing itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)" + WRONG,
    "core dump": "import os, signal\nos.chdir('/tmp') if os.path.isdir('/tmp') else None\nos.abort()",
}

# ---- the verdict: programs that end before the check has, scored 0 by either sandbox ----
LEAVERS = {
    "os._exit(0)": "import os\nos._exit(0)",
    "os._exit(0) when called": "import os\ndef solve(x):\n    os._exit(0)",
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "sys.exit(0) when called": "import sys\ndef solve(x):\n    sys.exit(0)",
    "SystemExit": "raise SystemExit",
    "KeyboardInterrupt": "def solve(x):\n    raise KeyboardInterrupt",
    "exception of its own": "class Quiet(BaseException): pass\ndef solve(x):\n    raise Quiet",
    "exception that cannot be shown": """
class Rude(BaseException):
    def __str__(self): raise self
    __repr__ = __str__
def solve(x):
    raise Rude
""",
    "another program in its place": "import os\nos.execv('/bin/true', ['true'])",
    "printing the mark": "print('passed')\nprint('OK\\n\\nRan 1 test in 0.000s')" + WRONG,
    "printing the mark as the last words": "import os\ndef solve(x):\n    os.write(1, b'passed\\n')\n    os._exit(0)",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))" + WRONG,
    "excepthook": """
import os, sys
sys.excepthook = sys.__excepthook__ = sys.unraisablehook = lambda *_: os._exit(0)
"""
    + WRONG,
    "a signal handler that leaves": """
import os, signal
signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
signal.setitimer(signal.ITIMER_REAL, 0.05)
def solve(x):
    while True: pass
""",
    "a check of its own": """
def check(candidate): pass
candidate = None
"""
    + WRONG,
    "AssertionError replaced": """
import builtins
class AssertionError(Exception): pass
builtins.AssertionError = builtins.BaseException = AssertionError
"""
    + WRONG,
    "builtins replaced": """
import builtins
builtins.exec = builtins.compile = builtins.all = builtins.abs = builtins.len = lambda *_, **__: 8
builtins.type = builtins.vars = builtins.dict = builtins.int = lambda *_, **__: 8
"""
    + WRONG,
    "builtins removed": "import builtins\nvars(builtins).clear()\n",
    "the module's builtins replaced": "__builtins__ = {'__build_class__': None}" + WRONG,
    "os replaced": """
import os, sys
os.read = lambda fd, size: b''
os.write = lambda fd, data: len(data)
os._exit = lambda status: None
sys.modules['os'] = None
"""
    + WRONG,
    "everything it can reach above it": """
import sys, types
frame = sys._getframe()
while frame:
    for name, value in list(frame.f_globals.items()):
        if isinstance(value, types.FunctionType) and value.__module__ == '__main__':
            frame.f_globals[name] = lambda *_, **__: None
    frame = frame.f_back
vars(sys.modules['__main__']).clear()
"""
    + WRONG,
    "descriptors closed": "import os\nos.closerange(0, 1024)" + WRONG,
    "descriptors closed when called": "import os\ndef solve(x):\n    os.closerange(0, 1024)",
    "garbage to all descriptors": """
import os
for fd in range(64):
    try: os.write(fd, b'passed\\n' * 10)
    except OSError: pass
"""
    + WRONG,
    "marks to all descriptors, then leave": """
import os
def solve(x):
    for fd in range(64):
        for word in (b'L', b'R', b'passed', b'True', b'1', b'0' * 16):
            try: os.write(fd, word)
            except OSError: pass
    os._exit(0)
""",
    "what it reads, written to all descriptors": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'L')
    except OSError: pass
seen = b''
for fd in range(3, 64):
    try:
        os.set_blocking(fd, True)
        if fd == min(f for f in range(3, 64) if os.fstat(f)): seen = os.read(fd, 4096)
    except OSError: pass
for fd in range(3, 64):
    for start in range(len(seen)):
        try: os.write(fd, seen[start:start + 16])
        except OSError: pass
os._exit(0)
""",
    "verdict written for the supervisor": """
import os
def solve(x):
    try: os.write(os.open(f'/proc/{os.getppid()}/fd/1', os.O_WRONLY), b'passed\\n')
    except OSError: pass
    os._exit(0)
""",
    "child that says it passed": """
import os
if os.fork() == 0:
    for fd in range(3, 64):
        try: os.write(fd, b'L' + b'0' * 16)
        except OSError: pass
    os._exit(0)
os.wait()
"""
    + WRONG,
    "modules replaced": """
import sys
for name in list(sys.modules): sys.modules[name] = None
"""
    + WRONG,
    "the test framework": "import pytest\npytest.exit('passed', 0)",
    "unittest": "import unittest\nunittest.main(argv=['x'], exit=True)",
    "lone surrogates": "solve = '\\ud800'\nprint(solve)",
    "bytes that are no text": "\udcff\x00",
    "nothing": "",
}

# ---- what lies outside: only namespaces hold ----
# Should the sandbox ever be broken, the attack does not run: it would hit the machine of whoever runs the tests.
GUARD = """
import os
if os.getppid() != 1 or os.path.exists('/etc/shadow') or os.path.exists('SENTINEL'):
    print('NOT CONTAINED')
    os._exit(77)
"""
INTRUDERS = {
    "deleting files": """
import os, shutil
for path in ('SENTINEL', os.path.dirname('SENTINEL')):
    try: os.remove(path)
    except OSError: pass
    shutil.rmtree(path, ignore_errors=True)
""",
    "deleting everything": """
import os
for root, folders, files in os.walk('/', topdown=False):
    for name in files:
        try: os.remove(os.path.join(root, name))
        except OSError: pass
    for name in folders:
        try: os.rmdir(os.path.join(root, name))
        except OSError: pass
""",
    "overwriting a file": "open('SENTINEL', 'w').write('gone')",
    "reading a file": "print(open('SENTINEL').read())",
    "writing everywhere": """
import os
places = ['/', '/tmp', '/var/tmp', '/dev/shm', '/root', '/home', '/etc', '/usr', '/usr/lib', '/lib', '/run', '/sys',
          '/dev', '/proc', 'ROOT', os.path.dirname('SENTINEL'), os.path.dirname(os.__file__), os.path.expanduser('~')]
for place in places:
    try: open(os.path.join(place, 'TOKEN'), 'w').write('here')
    except OSError: pass
""",
    "links to the outside": """
import os
os.symlink('SENTINEL', 'link')
try: open('link', 'w').write('gone')
except OSError: pass
os.link('SENTINEL', 'hard')
""",
    "changing the library": """
import os
try: open(os.__file__, 'a').write('#')
except OSError: pass
os.chmod(os.path.dirname(os.__file__), 0o777)
""",
    "reading the environment": """
import os
print(dict(os.environ))
os.system('env')
for pid in ('self', '1', str(os.getppid()), 'SCORER'):
    try: print(open(f'/proc/{pid}/environ').read())
    except OSError: pass
""",
    "network": """
import socket
for host in ('127.0.0.1', '::1', 'localhost', '0.0.0.0'):
    try: socket.create_connection((host, PORT), timeout=0.3).send(b'TOKEN')
    except OSError: pass
""",
    "datagrams": """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'TOKEN', ('127.0.0.1', PORT))
""",
    "abstract socket": """
import socket
link = socket.socket(socket.AF_UNIX)
link.connect('\\0TOKEN')
link.send(b'TOKEN')
""",
    "killing the parent": """
import os, signal, time
os.kill(os.getppid(), signal.SIGKILL)
os.kill(SCORER, signal.SIGKILL)
""",
    "killing everything": """
import os, signal
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
    for target in (-1, 0, -SCORER, SCORER, *range(2, 3000)):
        try: os.kill(target, number)
        except OSError: pass
""",
    "stopping the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nos.killpg(0, signal.SIGSTOP)",
    "tracing the parent": """
import ctypes, os
for pid in (os.getppid(), 1, SCORER):
    ctypes.CDLL(None).ptrace(16, pid, 0, 0)
""",
    "becoming root": """
import os
for become in (os.setuid, os.setgid, os.seteuid):
    try: become(0)
    except OSError: pass
open('/etc/TOKEN', 'w').write('here')
""",
    "namespaces within": """
import ctypes, os
libc = ctypes.CDLL(None)
if libc.unshare(0x10000000 | 0x20000) == 0:
    libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, b'size=10g')
    print('nested namespace')
    with open('/tmp/large', 'wb') as file: file.write(bytes(1 << 20))
""",
    "mounting": """
import ctypes
libc = ctypes.CDLL(None)
for kind in (b'tmpfs', b'proc', b'sysfs', b'devtmpfs'):
    if libc.mount(kind, b'/tmp', kind, 0, None) == 0: print('mounted', kind)
""",
    "remounting": """
import ctypes, os
libc = ctypes.CDLL(None)
for place in ('/', '/lib', '/usr/lib', os.path.dirname(os.path.dirname(os.__file__))):
    if libc.mount(None, place.encode(), None, 32 | 4096, None) == 0: print('mounted', place)
    if libc.umount2(place.encode(), 2) == 0: print('mounted', place)
""",
    "out of the new root": """
import os
os.mkdir('deeper')
try: os.chroot('deeper')
except OSError: pass
for _ in range(50): os.chdir('..')
print(os.listdir('.'), open('SENTINEL'[1:]).read())
""",
    "the scorer's descriptors": """
import os
for pid in ('self', '1', str(os.getppid()), 'SCORER'):
    for fd in range(64):
        try: os.write(os.open(f'/proc/{pid}/fd/{fd}', os.O_WRONLY), b'passed\\n')
        except OSError: pass
""",
    "running a shell": """
import subprocess
subprocess.run('touch /tmp/TOKEN ROOT/TOKEN; rm -f SENTINEL', shell=True)
""",
    "a shared library of the host": """
import ctypes
ctypes.CDLL(None).system(b'touch /tmp/TOKEN; rm -f SENTINEL')
""",
    "shared memory": """
import ctypes
libc = ctypes.CDLL(None)
libc.shmget(0x1234, 1 << 20, 0o1666)
from multiprocessing import shared_memory
shared_memory.SharedMemory('TOKEN', create=True, size=1 << 20)
""",
    "keys": """
import ctypes
libc = ctypes.CDLL(None)
for number, *arguments in ((248, b'user', b'TOKEN', b'x', 1, -3), (248, b'user', b'TOKEN', b'x', 1, -4),
                           (250, 10, -3, b'user', b'TOKEN', 0), (249, b'user', b'TOKEN', None, -3)):
    arguments = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    if libc.syscall(number, *arguments) > 0: print('NOT CONTAINED')
""",
    "sockets of other families": """
import socket
for family in range(64):
    if family not in (1, 2, 10):
        for kind in (1, 2, 3, 5):
            try: socket.socket(family, kind); print('NOT CONTAINED', family)
            except OSError: pass
""",
    "host name": "import socket\nsocket.sethostname('TOKEN')",
    "the clock and the machine": """
import ctypes, os, time
try: time.clock_settime(time.CLOCK_REALTIME, 0)
except OSError: pass
os.sched_setaffinity(0, {0})
ctypes.CDLL(None).reboot(0)
""",
}
INTRUDERS = {name: GUARD + program + WRONG for name, program in INTRUDERS.items()}
