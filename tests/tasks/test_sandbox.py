"""Generated programs: what passes, what does not, and that no program reaches anything outside."""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import os
import pickle
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hostile.honest import HONEST
from hostile.programs import CHECK, GREEDY, INTRUDERS, LEAVERS

from dllm_gym.tasks.grading import workers
from dllm_gym.tasks.sandbox import NamespaceSandbox, RlimitSandbox, Verdict, make_sandbox, nursery
from dllm_gym.tasks.sandbox.cage import EVERYWHERE, FILTERED
from dllm_gym.tasks.sandbox.folders import erase, shown

ROOT = Path(__file__).parents[2]
DOUBLE = "def solve(x):\n    return 2 * x\n"

# without namespaces these act on the whole machine (root is exempt from the limit on processes)
BOMBS = {"fork bomb", "fork bomb that does not give up", "memory hogs side by side", "shared memory of files"}


def sandbox(name: str, **settings):
    try:
        return make_sandbox(name, **settings)
    except ValueError as error:
        if "does not work on this machine" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["namespace", "rlimit"])
def either(request):
    return sandbox(request.param)


@pytest.fixture(scope="module")
def namespace():
    return sandbox("namespace")


def processes_of(box) -> list[int]:
    """Pids of processes with the sandbox's mark in their command line, which forks keep."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if box.mark.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def programs_of(box) -> list[int]:
    """The same without the one process that waits for programs; those that have just said their verdict may end."""
    patience = time.monotonic() + 30
    while len(found := processes_of(box)) > 1 and time.monotonic() < patience:
        time.sleep(0.01)
    return found[1:]


# ---- ordinary programs ----


def test_a_right_program_passes_and_a_wrong_one_fails(either):
    assert either.run(DOUBLE, CHECK) == Verdict(True, "passed", "")
    wrong = either.run("def solve(x):\n    return x\n", CHECK)
    assert not wrong.passed
    assert wrong.reason == "failed"
    assert wrong.output.splitlines()[-1] == "AssertionError"


def test_verdicts_come_in_the_order_of_the_programs(either):
    programs = [DOUBLE, "import time\ntime.sleep(0.3)\n" + DOUBLE, "", DOUBLE]
    assert [verdict.passed for verdict in either.run_all(programs, [CHECK] * 4)] == [True, True, False, True]
    assert [verdict.passed for verdict in either.run_all(["x = 1", "1 / 0"])] == [True, False]
    assert either.run_all([]) == []
    with pytest.raises(ValueError, match="there are 1 for 2 programs"):
        either.run_all(["", ""], [""])


def test_what_ordinary_programs_use_is_there(either):
    program = """
import dataclasses, json, os, pickle, random, re, subprocess, sys, tempfile, threading, typing
@dataclasses.dataclass
class Point:
    x: 'int'
    next: typing.Optional['Point'] = None
def solve(x):
    point = pickle.loads(pickle.dumps(Point(x)))
    with tempfile.TemporaryFile('w+') as file, open('here', 'w') as here, open(os.devnull, 'w') as null:
        print(json.dumps([point.x]), file=file)
        file.seek(0)
        number = json.load(file)[0]
    found = []
    thread = threading.Thread(target=lambda: found.append(2 * number))
    thread.start()
    thread.join()
    return found[0]
if __name__ == '__main__':
    print(input())
"""
    verdict = either.run(program, "from solution import *\nimport solution\nassert solution.Point(1).x == 1\n" + CHECK)
    assert verdict == Verdict(True, "passed", "")


def test_a_program_sees_nothing_of_our_environment_and_always_the_same_hashes(either, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "do not tell")
    program = "import os, sys\nprint(hash('x'), {'a', 'b', 'c'}, sys.argv, dict(os.environ))"
    first, second = either.run(program), either.run(program)
    assert first.passed
    assert "SECRET" not in first.output
    assert "do not tell" not in first.output
    assert first.output.split("{'PYTHON")[0] == second.output.split("{'PYTHON")[0]


def test_limits_end_a_program_with_their_reason():
    box = sandbox("rlimit", timeout=0.5, output=10)
    assert box.run("while True: pass").reason == "timeout"
    assert box.run("import os\nos.fork()\nwhile True: pass").reason == "timeout"
    assert box.run("import time\ntime.sleep(100)").reason == "timeout"
    assert box.run("import os\nos._exit(3)").reason == "ended early with status 3"
    assert box.run("import os\nos.kill(os.getpid(), 11)").reason == "killed by signal 11"
    assert box.run("x = bytearray(1 << 30)").reason == "failed"
    assert box.run("print('0123456789' * 1000000)") == Verdict(True, "passed", "0123456789")


def test_packages_are_shown_on_request(either):
    program = "import pytest\nprint(pytest.__version__)"
    assert either.run(program).output.splitlines()[-1] == "ModuleNotFoundError: No module named 'pytest'"
    shown = make_sandbox(either.name, packages=True).run(program)
    assert shown.output.strip() == importlib.metadata.version("pytest")


# ---- settings ----


def test_auto_means_namespaces_and_refuses_without_them(monkeypatch, namespace):
    assert isinstance(make_sandbox("auto"), NamespaceSandbox)
    assert isinstance(make_sandbox("rlimit"), RlimitSandbox)
    failure = Verdict(False, "sandbox: OSError: [Errno 1] unshare: Operation not permitted", "")
    monkeypatch.setattr(NamespaceSandbox, "_attempt", lambda *_, **__: failure)
    with pytest.raises(ValueError, match="not permitted.*sandbox=rlimit"):
        make_sandbox("auto")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="needs Linux"):
        make_sandbox("rlimit")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "docker"}, "choose one of auto, namespace, rlimit"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"memory": 0.5}, "memory=0.5"),
        ({"processes": 0}, "processes=0"),
        ({"workers": -1}, "workers=-1"),
        ({"output": True}, "output=True"),
    ],
)
def test_a_wrong_setting_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        make_sandbox(**{"name": "rlimit", **settings})


def test_a_sandbox_that_stops_working_raises_instead_of_scoring_zero(monkeypatch):
    box = sandbox("rlimit")
    assert box.run(DOUBLE, CHECK).passed
    monkeypatch.setattr(nursery, "CAGE", ROOT / "no_such_cage.py")
    box._nursery.close()
    with pytest.raises(RuntimeError, match="does not start any more"):
        box.run(DOUBLE, CHECK)


def test_the_folders_shown_are_libraries_and_none_lies_in_another():
    folders = [Path(folder) for folder in shown([]) if Path(folder).is_dir()]
    assert not any(inner != outer and inner.is_relative_to(outer) for inner in folders for outer in folders)
    assert not any(ROOT.is_relative_to(folder) for folder in folders)
    assert any(Path(os.__file__).is_relative_to(folder) for folder in folders)


# ---- programs with accidents ----


def test_a_check_that_is_no_python_fails_everybody(either):
    assert not either.run(DOUBLE, "assert (").passed


def test_a_deep_or_locked_folder_is_removed(tmp_path):
    folder = tmp_path / "deep"
    script = """
import os, sys
os.mkdir(sys.argv[1]); os.chdir(sys.argv[1])
for number in range(1100):
    open('file', 'w').close(); os.symlink('/', 'link')
    os.mkdir('d' * 200); os.chdir('d' * 200)
os.chmod('.', 0)
"""
    subprocess.run([sys.executable, "-c", script, folder], check=True)
    assert erase(str(folder))
    assert not folder.exists()
    assert erase(str(folder))


def test_a_program_with_deep_folders_does_not_stop_the_scorer(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = "import os\nfor _ in range(1100):\n    os.mkdir('d' * 200)\n    os.chdir('d' * 200)\n"
    assert sandbox("rlimit").run(program).passed
    assert list(tmp_path.iterdir()) == []


def test_a_system_without_free_processes_is_asked_again(monkeypatch):
    real, failures = subprocess.Popen, [BlockingIOError(), BlockingIOError()]

    def crowded(*arguments, **settings):
        if failures:
            raise failures.pop()
        return real(*arguments, **settings)

    monkeypatch.setattr(subprocess, "Popen", crowded)
    assert sandbox("rlimit").run(DOUBLE, CHECK).passed
    assert failures == []


def test_locks_and_pools_of_processes_work(namespace):
    program = "import multiprocessing as m\nm.Lock()\nwith m.Pool(2) as pool: print(pool.map(abs, [1, -2]))"
    assert namespace.run(program).output == "[1, 2]\n"


@pytest.mark.skipif(os.uname().machine not in FILTERED, reason="no filter for this processor")
def test_dangerous_system_calls_are_refused(either):
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for number in NUMBERS:
    print(libc.syscall(number, 0, 0, 0, 0, 0), ctypes.get_errno())
import socket
for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6): socket.socket(family)
socket.socketpair()
try: socket.socket(40, socket.SOCK_STREAM)
except PermissionError: print('refused')
"""
    _, *numbers, socket_number, pair = FILTERED[os.uname().machine]
    verdict = either.run(program.replace("NUMBERS", repr([*numbers, *EVERYWHERE])))
    assert verdict.output.splitlines() == ["-1 1"] * (len(numbers) + len(EVERYWHERE)) + ["refused"], (
        socket_number,
        pair,
    )


# ---- hostile programs ----


def test_greedy_and_leaving_programs_score_zero_without_namespaces(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    box = sandbox("rlimit", timeout=0.5, workers=4)
    programs = {name: text for name, text in {**GREEDY, **LEAVERS}.items() if name not in BOMBS}
    verdicts = dict(zip(programs, box.run_all(list(programs.values()), [CHECK] * len(programs)), strict=True))
    assert [name for name, verdict in verdicts.items() if verdict.passed] == []
    assert programs_of(box) == []
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_kills_its_supervisor_scores_zero_and_takes_nothing_along():
    box = sandbox("rlimit", timeout=0.5)
    program = """
import os, time
supervisor = os.getppid()
if os.fork() == 0:
    os.setsid()
    time.sleep(100)
os.kill(supervisor, 9)
time.sleep(100)
"""
    assert box.run(program, CHECK).reason == "it attacked its supervisor"
    assert programs_of(box) == []


STUBBORN = {
    "waits": "import time\nprint(1, flush=True)\ntime.sleep(1000)",
    "asks the kernel not to be killed": """
import ctypes, os, signal, time
for _ in range(3):
    os.fork()
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
    for number in range(1, 65):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
time.sleep(1000)
""",
    "daemons": """
import ctypes, os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork(): os._exit(0)
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
        os.closerange(0, 64)
        time.sleep(1000)
time.sleep(1000)
""",
}


@pytest.mark.parametrize("program", STUBBORN.values(), ids=STUBBORN)
@pytest.mark.parametrize("name", ["namespace", "rlimit"])
def test_a_scorer_that_is_killed_takes_its_programs_along(name, program, tmp_path):
    sandbox(name)  # or skip
    box = SimpleNamespace(mark=secrets.token_hex(8))
    script = f"""
import threading, time
from dllm_gym.tasks.sandbox import make_sandbox
box = make_sandbox({name!r}, timeout=100.0)
box._nursery.close()
box.mark = box._nursery.mark = {box.mark!r}
for _ in range(2): threading.Thread(target=box.run, args=({program!r},)).start()
while True: time.sleep(1)
"""
    scorer = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)})
    patience = time.monotonic() + 60
    while len(processes_of(box)) < (7 if name == "namespace" else 5) and time.monotonic() < patience:
        time.sleep(0.02)
    time.sleep(0.3)
    assert processes_of(box) != []
    scorer.kill()
    scorer.wait()
    while processes_of(box) and time.monotonic() < patience:
        time.sleep(0.02)
    assert processes_of(box) == []


def test_a_sandbox_that_is_dropped_leaves_no_process_and_a_copy_has_its_own():
    box = sandbox("rlimit")
    for other in (copy.deepcopy(box), pickle.loads(pickle.dumps(box))):
        assert other.run(DOUBLE, CHECK).passed
    mark = box.mark
    del box, other
    gc.collect()
    assert processes_of(SimpleNamespace(mark=mark)) == []


def test_a_forked_process_starts_its_own(either):
    assert either.run(DOUBLE, CHECK).passed
    child = os.fork()
    if child == 0:
        os._exit(0 if either.run(DOUBLE, CHECK).passed else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert either.run(DOUBLE, CHECK).passed


def test_a_sandbox_whose_processes_were_killed_starts_them_again(either):
    assert either.run(DOUBLE, CHECK).passed
    for pid in processes_of(either):
        os.kill(pid, 9)
    assert either.run(DOUBLE, CHECK).passed


def test_waiting_for_a_processor_is_not_counted():
    """One core, other programs on it: a second of work passes, and two processes share one account."""
    work = "import time\ndef solve(x):\n    while time.process_time() < 1.0: pass\n    return 2 * x\n"
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        assert sandbox("rlimit", timeout=1.5).run(work, CHECK).passed
    finally:
        os.sched_setaffinity(0, allowed)
        for process in load:
            process.kill()
            process.wait()


def test_the_cores_that_count_are_those_that_may_be_used(either):
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        one = make_sandbox(either.name)
        assert one.workers == workers.cores() == 1
        assert one.run("import os\nassert os.cpu_count() == len(os.sched_getaffinity(0)) == 1").passed
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_control_group_limits_the_cores(monkeypatch):
    monkeypatch.setattr(workers, "quotas", lambda: iter([0.5, 64.0]))
    assert workers.cores() == 1


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(honest_box, name):
    verdict = honest_box.run(HONEST[name], "f()")
    assert verdict.passed, (verdict.reason, verdict.output)


@pytest.fixture(scope="module")
def honest_box():
    return sandbox("namespace", packages=True)


def test_shared_memory_of_no_kind_passes_the_limit(namespace):
    program = """
import ctypes, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
MIB = 1 << 20
def system_v(size):
    number = libc.shmget(0, ctypes.c_size_t(size), 0o1600)
    if number < 0: raise OSError(ctypes.get_errno(), 'shmget')
    ctypes.memset(libc.shmat(number, None, 0), 1, size)
def of_file(place):
    def fill(size, count=[0]):
        count[0] += 1
        with open(f'{place}/{count[0]}', 'wb') as file:
            for _ in range(size // MIB): file.write(bytes(MIB))
    return fill
def memory_file(size):
    held.append(os.memfd_create('x'))
    os.write(held[-1], bytes(size))
held = []
for fill in (system_v, of_file('/dev/shm'), of_file('/tmp'), of_file('/src'), memory_file):
    got = 0
    try:
        while got < 200: fill(4 * MIB); got += 4
    except OSError: pass
    print(got)
"""
    filled = [int(line) for line in namespace.run(program).output.split()]
    assert len(filled) == 5
    assert filled[0] == filled[4] == 0
    assert sum(filled) <= 64 + 16 + 16
    assert namespace.run(GREEDY["shared memory without a file"]).reason in ("memory", "failed", "killed by signal 9")


class Outside:
    """What hostile programs are after: a file, a server, a secret in the environment, this very process."""

    def __init__(self, tmp_path: Path):
        self.token = f"dllm_gym_{secrets.token_hex(8)}"
        self.sentinel = tmp_path / "precious" / "sentinel.txt"
        self.sentinel.parent.mkdir()
        self.sentinel.write_text("precious")
        self.streams = [socket.create_server(("127.0.0.1", 0))]
        self.port = self.streams[0].getsockname()[1]
        self.datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.datagrams.bind(("127.0.0.1", self.port))
        self.streams.append(socket.socket(socket.AF_UNIX))
        self.streams[1].bind(f"\0{self.token}")
        self.streams[1].listen()
        for server in (*self.streams, self.datagrams):
            server.setblocking(False)

    def aim(self, program: str) -> str:
        names = {"SENTINEL": self.sentinel, "TOKEN": self.token, "PORT": self.port, "SCORER": os.getpid(), "ROOT": ROOT}
        for word, value in names.items():
            program = program.replace(word, str(value))
        return program

    def visitors(self) -> int:
        count = 0
        for receive in (*(server.accept for server in self.streams), lambda: self.datagrams.recv(1)):
            try:
                receive()
                count += 1
            except BlockingIOError:
                continue
        return count

    def left_behind(self) -> list[Path]:
        places = ["/", "/tmp", "/var/tmp", "/dev/shm", "/etc", "/run", "/usr", "/usr/lib", Path.home(), ROOT]
        return [Path(place, self.token) for place in places if Path(place, self.token).exists()]


def test_hostile_programs_are_contained(monkeypatch, tmp_path):
    """More than a hundred programs: the scorer survives, all score 0, no process and no file is left."""
    monkeypatch.setenv("SECRET_TOKEN", "do not tell")
    box = sandbox("namespace", timeout=0.5, workers=4)
    outside = Outside(tmp_path)
    programs = {name: outside.aim(program) for name, program in {**GREEDY, **LEAVERS, **INTRUDERS}.items()}
    assert len(programs) >= 100
    host = socket.gethostname()
    verdicts = dict(zip(programs, box.run_all(list(programs.values()), [CHECK] * len(programs)), strict=True))
    assert [name for name, verdict in verdicts.items() if verdict.passed] == []
    words = ("NOT CONTAINED", "do not tell", "precious", "mounted", "nested")
    told = [n for n, verdict in verdicts.items() for line in verdict.output.splitlines() if line.startswith(words)]
    assert told == []
    assert programs_of(box) == []
    assert outside.visitors() == 0
    assert outside.left_behind() == []
    assert outside.sentinel.read_text() == "precious"
    assert outside.sentinel.stat().st_nlink == 1
    assert socket.gethostname() == host
    assert box.run(DOUBLE, CHECK).passed


@pytest.mark.parametrize("name", ["fork bomb that does not give up", "memory hogs side by side", "daemon"])
def test_the_kernel_takes_everything_along_when_the_time_is_up(namespace, name):
    box = sandbox("namespace", timeout=0.5)
    assert not box.run(GREEDY[name], CHECK).passed
    assert programs_of(box) == []


def test_a_program_has_no_rights_and_sees_no_files(namespace):
    program = """
import os
print(os.getppid(), sorted(os.listdir('/dev')), os.listdir('/tmp'), sorted(os.listdir('/etc')), os.path.exists('/proc'))
print(open('/etc/passwd').read().count(':'), os.listdir('/src'), os.getcwd())
for path in ('/', '/lib', os.path.dirname(os.__file__)):
    try: open(os.path.join(path, 'new'), 'w')
    except OSError as error: print(error.strerror)
for attempt in (lambda: os.chroot('/tmp'), lambda: os.setuid(0), lambda: os.mknod('/tmp/x', 0o60600, 1)):
    try: attempt()
    except OSError as error: print(error.strerror)
import socket
print(socket.socket().connect_ex(('127.0.0.1', PORT)) == 111, socket.socket().connect_ex(('1.1.1.1', 53)) == 101)
for attempt in (socket.if_nameindex, lambda: socket.sethostname('x'), lambda: os.kill(1, 9)):
    try: attempt()
    except OSError as error: print(error.strerror)
print('still here')
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        lines = namespace.run(program.replace("PORT", str(server.getsockname()[1]))).output.splitlines()
    beside = sorted(
        {folder.split("/")[2] for folder in shown([]) if folder.startswith("/tmp/")}
    )  # packages may lie there
    devices, files = "['full', 'null', 'random', 'shm', 'urandom', 'zero']", "['group', 'hosts', 'passwd']"
    assert lines[0] == f"1 {devices} {beside} {files} False"
    assert lines[1] == "6 ['solution.py'] /tmp"
    assert lines[2:5] == ["Read-only file system"] * 3
    assert lines[5:8] == ["Operation not permitted"] * 3
    assert lines[8:] == ["True True", "Operation not permitted", "Operation not permitted", "still here"]


def test_files_do_not_last_from_one_program_to_the_next(namespace):
    program = "import os\nassert 'left' not in os.listdir('.'), os.listdir('.')\nopen('left', 'w').write('x')"
    assert [verdict.passed for verdict in namespace.run_all([program] * 3)] == [True] * 3
