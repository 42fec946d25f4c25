"""Programs that use what solutions of the benchmarks use; each defines ``f()``, which raises unless it is there.

HumanEval's own solutions import collections, copy, hashlib, math, random, re, string and typing; the rest is what the
tasks of MBPP and KodCode ask for.
"""

from __future__ import annotations

HONEST = {
    "a hundred threads": """
import threading

def f():
    n = [0]
    ev = threading.Event()
    l = threading.Lock()

    def w():
        ev.wait()
        with l:
            n[0] += 1

    ts = [threading.Thread(target=w) for _ in range(100)]
    [t.start() for t in ts]
    ev.set()
    [t.join() for t in ts]
    assert n[0] == 100
""",
    "64 threads of a pool": """
from concurrent.futures import ThreadPoolExecutor

def f():
    with ThreadPoolExecutor(64) as p:
        assert sum(p.map(abs, range(1000))) == 499500
""",
    "pool of processes": """
from concurrent.futures import ProcessPoolExecutor

def s(x):
    return x * x

def f():
    with ProcessPoolExecutor() as p:
        assert list(p.map(s, range(5))) == [0, 1, 4, 9, 16]
""",
    "new interpreters": """
import multiprocessing as m

def s(x):
    return x * x

def f():
    with m.get_context("spawn").Pool(2) as p:
        assert p.map(s, [1, 2]) == [1, 4]
""",
    "fork server": """
import multiprocessing as m

def s(x):
    return x * x

def f():
    with m.get_context("forkserver").Pool(2) as p:
        assert p.map(s, [1, 2]) == [1, 4]
""",
    "manager": """
import multiprocessing as m

def w(d):
    d["x"] = 1

def f():
    with m.Manager() as man:
        d = man.dict()
        p = m.Process(target=w, args=(d,))
        p.start()
        p.join()
        assert d["x"] == 1
""",
    "shared memory": """
from multiprocessing import shared_memory

def f():
    s = shared_memory.SharedMemory(create=True, size=8 << 20)
    s.buf[0] = 3
    t = shared_memory.SharedMemory(s.name)
    assert t.buf[0] == 3
    t.close()
    s.close()
    s.unlink()
""",
    "queue between processes": """
import multiprocessing as m

def w(q):
    q.put(3)

def f():
    q = m.Queue()
    p = m.Process(target=w, args=(q,))
    p.start()
    assert q.get(timeout=5) == 3
    p.join()
    v = m.Value("i", 0)
    a = m.Array("d", 10)
""",
    "commands": """
import subprocess, sys

def f():
    assert (
        subprocess.run([sys.executable, "-c", "print(1+1)"], capture_output=True, text=True).stdout == "2\\n"
    )
    assert subprocess.check_output("echo hi | cat", shell=True, text=True) == "hi\\n"
    assert subprocess.run(["ls", "/tmp"], capture_output=True).returncode == 0
""",
    "shell": """
import os

def f():
    assert os.system("true") == 0 and os.popen("echo x").read() == "x\\n"
""",
    "time zones": """
from zoneinfo import ZoneInfo, available_timezones
from datetime import *

def f():
    assert datetime(2020, 1, 1, tzinfo=ZoneInfo("Asia/Tokyo")).utcoffset() == timedelta(hours=9)
    assert len(available_timezones()) > 300
""",
    "local time": """
import time, os

def f():
    os.environ["TZ"] = "America/New_York"
    time.tzset()
    assert time.timezone == 18000
""",
    "locale": """
import locale

def f():
    locale.setlocale(locale.LC_ALL, "")
    locale.setlocale(locale.LC_ALL, "C.UTF-8")
    assert locale.getlocale()[1]
    locale.localeconv()
    locale.getpreferredencoding()
""",
    "source text": """
import inspect

class A:
    def m(self):
        return 1

def f():
    assert "return 1" in inspect.getsource(A)
    assert "def f" in inspect.getsource(f)
    assert inspect.getfile(f).endswith("solution.py")
    import solution

    assert "class A" in inspect.getsource(solution)
    inspect.signature(f)
""",
    "lines of a traceback": """
import traceback

def f():
    try:
        1 / 0  # here
    except ZeroDivisionError:
        assert "1 / 0  # here" in traceback.format_exc()
""",
    "database": """
import sqlite3

def f():
    c = sqlite3.connect("x.db")
    c.execute("create table t(a)")
    c.execute("insert into t values(1)")
    c.commit()
    assert sqlite3.connect("x.db").execute("select a from t").fetchone() == (1,)
    assert sqlite3.connect(":memory:")
""",
    "temporary files": """
import os
import tempfile

def f():
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile("w", dir=folder) as file:
        file.write("x")
        assert len(os.listdir(folder)) == 1
    with open("large", "wb") as file:
        file.write(bytes(10 << 20))
""",
    "exit and quit": """
def f():
    try:
        exit(0)
    except SystemExit:
        pass
    try:
        quit()
    except SystemExit:
        return
""",
    "asyncio": """
import asyncio

async def g():
    await asyncio.sleep(0.01)
    return 1

async def h():
    return await asyncio.gather(*(g() for _ in range(100)))

def f():
    assert sum(asyncio.run(h())) == 100

    async def s():
        p = await asyncio.create_subprocess_shell("echo a", stdout=asyncio.subprocess.PIPE)
        assert (await p.communicate())[0] == b"a\\n"

    asyncio.run(s())
""",
    "sockets": """
import socket, threading

def f():
    s = socket.create_server(("localhost", 0))
    t = threading.Thread(target=lambda: s.accept()[0].sendall(b"x"))
    t.start()
    assert socket.create_connection(s.getsockname()[:2]).recv(1) == b"x"
    t.join()
""",
    "web server": """
import http.server, threading, urllib.request

def f():
    s = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    assert urllib.request.urlopen(f"http://127.0.0.1:{s.server_port}/").status == 200
    s.shutdown()
""",
    "names of host and user": """
import socket, getpass, os, pathlib, pwd, platform

def f():
    assert socket.gethostbyname(socket.gethostname()) == "127.0.0.1"
    getpass.getuser()
    os.path.expanduser("~")
    pathlib.Path.home()
    pwd.getpwuid(os.getuid())
    platform.platform()
    platform.uname()
    platform.python_version()
""",
    "alarm": """
import signal, time

def f():
    def h(*a):
        raise TimeoutError

    signal.signal(signal.SIGALRM, h)
    signal.alarm(1)
    try:
        time.sleep(3)
    except TimeoutError:
        return
    assert 0
""",
    "ending a command": """
import subprocess, signal

def f():
    p = subprocess.Popen(["sleep", "100"])
    p.terminate()
    assert p.wait() == -15
""",
    "fork": """
import os

def f():
    ear, mouth = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(mouth, b"x")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(ear, 1) == b"x"
""",
    "numpy": """
import numpy as np

def f():
    assert np.linalg.inv(np.eye(3)).trace() == 3
""",
    "pandas": """
import pandas as pd

def f():
    assert pd.DataFrame({"a": [1, 2]}).a.sum() == 3
    pd.Timestamp("2020-01-01", tz="Europe/Berlin")
""",
    "sympy": """
import sympy

def f():
    x = sympy.symbols("x")
    assert sympy.diff(x**2, x) == 2 * x
""",
    "matplotlib": """
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

def f():
    plt.plot([1, 2])
    plt.savefig("x.png")
""",
    "large stack": """
import threading, sys

def f():
    sys.setrecursionlimit(10**6)
    threading.stack_size(1 << 27)
    out = []

    def r(n):
        return 0 if n == 0 else 1 + r(n - 1)

    t = threading.Thread(target=lambda: out.append(r(50000)))
    t.start()
    t.join()
    assert out == [50000]
""",
    "deep recursion with a cache": """
import functools, sys

@functools.lru_cache(None)
def r(n):
    return 0 if n == 0 else 1 + r(n - 1)

def f():
    sys.setrecursionlimit(10**5)
    assert r(5000) == 5000
""",
    "reload": """
import importlib

X = 1

def f():
    import solution

    importlib.reload(solution)
""",
    "its own name": """
import sys

def f():
    assert __name__ == "solution"
    sys.modules["__main__"]
    assert __file__.endswith("solution.py")
""",
    "doctest": '''
def g():
    """
    >>> g()
    1
    """
    return 1

def f():
    import doctest, solution

    assert doctest.testmod(solution) == (0, 1)
''',
    "unittest": """
import unittest

class T(unittest.TestCase):
    def test(self):
        self.assertEqual(1, 1)

def f():
    assert unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T)).wasSuccessful()
""",
    "standard library": """
import importlib
import random
import secrets
import uuid

NAMES = '''
array ast argparse base64 binascii bisect bz2 cProfile calendar cmath collections configparser contextlib copy csv
ctypes curses decimal difflib dis email enum fcntl fnmatch fractions gc getopt glob graphlib gzip hashlib heapq hmac
html ipaddress json logging lzma mmap operator pickle pprint queue re readline reprlib resource sched select selectors
shelve shutil ssl stat statistics string struct tarfile termios textwrap timeit tokenize tracemalloc types unicodedata
urllib.parse weakref xml.etree.ElementTree zipfile zlib
'''

def f():
    for name in NAMES.split():
        importlib.import_module(name)
    assert random.Random(1).random() == random.Random(1).random() != random.random()
    assert uuid.uuid4() != uuid.uuid1()
    assert secrets.token_hex()
""",
    "log file": """
import logging

def f():
    logging.basicConfig(level=10, filename="x.log")
    logging.info("x")
    logging.shutdown()
""",
    "mime types": """
import mimetypes

def f():
    assert mimetypes.guess_type("a.png")[0] == "image/png"
""",
    "type hints": """
from dataclasses import dataclass
import typing

@dataclass
class A:
    x: int

def f():
    assert typing.get_type_hints(A) == {"x": int}
    assert A.__annotations__ == {"x": int}
""",
    "many files": """
def f():
    for i in range(1000):
        open(f"f{i}", "w").write("x")
    h = [open(f"f{i}") for i in range(90)]
""",
    "default pool": """
import os, multiprocessing

def f():
    assert os.cpu_count() >= 1
    assert len(os.sched_getaffinity(0)) >= 1
    multiprocessing.Pool().terminate()
""",
    "pool of eight with numpy": """
from multiprocessing import Pool
import numpy as np

def s(x):
    return np.ones(100000).sum()

def f():
    with Pool(8) as p:
        assert p.map(s, range(16)) == [100000.0] * 16
""",
    "memory map": """
import mmap

def f():
    m = mmap.mmap(-1, 1 << 20)
    m[0] = 1
    m.close()
""",
    "the interpreter": """
import sys, os, sysconfig

def f():
    assert os.path.exists(sys.executable)
    sysconfig.get_paths()
""",
}
