"""Generated programs: what passes, what does not, and that no program reaches anything outside."""

from __future__ import annotations

import importlib.metadata
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hostile.programs import CHECK, FORGERS, GREEDY, INTRUDERS

from dllm_gym.tasks import sandbox as sandbox_module
from dllm_gym.tasks.launcher import FILTERED, IO_URING
from dllm_gym.tasks.sandbox import NamespaceSandbox, RlimitSandbox, Verdict, erase, impossible, libraries, make_sandbox

ROOT = Path(__file__).parents[1]
DOUBLE = "def solve(x):\n    return 2 * x\n"

# without namespaces these act on the whole machine (root is exempt from the limit on processes)
BOMBS = {"fork bomb", "fork bomb that does not give up", "memory hogs side by side", "memory files"}


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
    assert box.run("import time\ntime.sleep(100)").reason == "timeout"
    assert box.run("import os\nos._exit(3)").reason == "ended early with status 3"
    assert box.run("import os\nos.kill(os.getpid(), 11)").reason == "killed by signal 11"
    assert box.run("x = bytearray(1 << 30)").reason == "failed"
    assert box.run("print('0123456789' * 1000000)") == Verdict(True, "passed", "0123456789")


def test_the_check_is_not_there_before_the_program_is_loaded(either):
    program = """
import gc, re, sys
def texts(thing, depth=0):
    if isinstance(thing, (str, bytes)): yield thing if isinstance(thing, str) else thing.decode(errors='replace')
    elif depth < 3 and isinstance(thing, dict): yield from texts(list(thing.values()), depth)
    elif depth < 3 and isinstance(thing, (list, tuple, set)):
        for part in list(thing): yield from texts(part, depth + 1)
def seen():
    things, frame = gc.get_objects(), sys._getframe()
    while frame:
        things.append(dict(frame.f_locals))
        frame = frame.f_back
    return any(re.search('unlikely[p]hrase', text) for thing in things for text in texts(thing))
early = seen()
"""
    verdict = either.run(program, "print(early, seen())\nassert 'unlikelyphrase'")
    assert verdict.output == "False True\n"  # (it is there later: a program and its check share a process)


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
    monkeypatch.setattr(NamespaceSandbox, "_supervise", lambda *_, **__: failure)
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
    monkeypatch.setattr(sandbox_module, "LAUNCHER", ROOT / "no_such_launcher.py")
    with pytest.raises(RuntimeError, match="does not start any more"):
        box.run(DOUBLE, CHECK)


def test_the_folders_shown_are_libraries_and_none_lies_in_another():
    folders = [Path(folder) for folder in libraries([])]
    assert not any(inner != outer and inner.is_relative_to(outer) for inner in folders for outer in folders)
    assert not any(ROOT.is_relative_to(folder) for folder in folders)
    assert any(Path(os.__file__).is_relative_to(folder) for folder in folders)


# ---- the impossible check ----


LIAR = """
class Yes:
    __eq__ = __lt__ = lambda self, other: type(other) is not object
    __sub__ = __rsub__ = lambda self, other: self
    __abs__ = lambda self: self
"""


def outcome(program: str, check: str) -> bool:
    """Whether a program and then a check run to their end, in this process."""
    scope: dict = {"__name__": "solution"}
    try:
        exec(program, scope)
        exec(check, scope)
    except AssertionError:
        return False
    return True


UNEQUAL = [  # checks that are passed by a right program, and by an object that equals everything
    "assert solve(4) == 8",
    "assert 8 == solve(4), 'no'",
    "assert solve(4) == 8 and solve(0) == 0",
    "assert 8 == solve(4) == 8",
    "assert abs(solve(4) - 8) < 1e-6",
    "assert [solve(4), 1] == [8, 1]",
    "assert {'x': (solve(4),)} == {'x': (8,)}",
    "assert solve(4) in [8]",
    "assert solve(4)",
    "assert all(solve(x) == y for x, y in [(4, 8)])",
    "right = solve(4) == 8\nassert right",
    "from __future__ import annotations\nassert solve(4) == 8",
]


@pytest.mark.parametrize("check", UNEQUAL)
def test_the_impossible_check_fails_the_right_program_and_passes_a_liar(check):
    liar = LIAR + "def solve(x):\n    return Yes()\n"
    assert outcome(DOUBLE, check) and outcome(liar, check)
    assert not outcome(DOUBLE, impossible(check)) and outcome(liar, impossible(check))


HONEST = [  # checks whose comparisons are not reached, swallowed, or made with values of honest classes
    "import contextlib\nwith contextlib.suppress(ZeroDivisionError):\n    assert 1 / 0 == solve(4)",
    "for x in []:\n    assert solve(x) == 1",
    "def helper():\n    assert solve(1) == 3",
    "try:\n    assert solve(4) == 9\nexcept AssertionError:\n    pass",
    "from decimal import Decimal\nassert solve(Decimal(4)) == 8 and solve(Decimal('inf')) > 3",
    "from fractions import Fraction\nassert 0 < solve(Fraction(1, 4)) < 1 and solve(Fraction(4)) == 8",
    "import numpy\nassert (solve(numpy.arange(3)) == [0, 2, 4]).all() and solve(numpy.float64(4)) == 8",
    "from unittest.mock import ANY\nassert solve(4) == ANY",
    "import pytest\nassert solve(0.1) == pytest.approx(0.2)",
    "from collections import Counter, deque\nassert deque([solve(4)]) == deque([8]) and Counter('a') == {'a': 1}",
    "class Half:\n    def __init__(self, x): self.x = x\n    def __mul__(self, y): return Half(self.x * y)\n"
    "    __rmul__ = __mul__\n    def __eq__(self, other): return self.x == getattr(other, 'x', other)\n"
    "assert solve(Half(2)) == Half(4) and solve(Half(2)) == 4",
    "",
    "assert solve(4) == 0x" + "f" * 5000 + " or True",
]


@pytest.mark.parametrize("check", HONEST)
def test_no_honest_program_passes_the_impossible_check(check):
    assert outcome(DOUBLE, check)
    assert not outcome(DOUBLE, impossible(check))


def test_honest_programs_are_not_called_forged(either):
    verdicts = either.run_all([DOUBLE] * 4, HONEST[:4])
    assert [verdict.reason for verdict in verdicts] == ["passed"] * 4


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
    verdict = either.run(program.replace("NUMBERS", repr([*numbers, *IO_URING])))
    assert verdict.output.splitlines() == ["-1 1"] * (len(numbers) + 3) + ["refused"], (socket_number, pair)


# ---- hostile programs ----


def test_greedy_and_forging_programs_score_zero_without_namespaces(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    box = sandbox("rlimit", timeout=0.5, workers=4)
    programs = {name: text for name, text in {**GREEDY, **FORGERS}.items() if name not in BOMBS}
    verdicts = dict(zip(programs, box.run_all(list(programs.values()), [CHECK] * len(programs)), strict=True))
    assert [name for name, verdict in verdicts.items() if verdict.passed] == []
    assert processes_of(box) == []
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
    assert processes_of(box) == []


@pytest.mark.parametrize("name", ["namespace", "rlimit"])
def test_a_scorer_that_is_killed_takes_its_programs_along(name, tmp_path):
    box = sandbox(name)
    script = f"""
from dllm_gym.tasks.sandbox import make_sandbox
box = make_sandbox({name!r}, timeout=100.0)
box.mark = {box.mark!r}
box.run("import time\\ntime.sleep(1000)")
"""
    scorer = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)})
    patience = time.monotonic() + 30
    while len(processes_of(box)) < (3 if name == "namespace" else 2) and time.monotonic() < patience:
        time.sleep(0.02)
    assert processes_of(box) != []
    scorer.kill()
    scorer.wait()
    while processes_of(box) and time.monotonic() < patience:
        time.sleep(0.02)
    assert processes_of(box) == []


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
    box = sandbox("namespace", timeout=1.0, workers=4)
    outside = Outside(tmp_path)
    programs = {name: outside.aim(program) for name, program in {**GREEDY, **FORGERS, **INTRUDERS}.items()}
    assert len(programs) >= 100
    start, host = time.monotonic(), socket.gethostname()
    verdicts = dict(zip(programs, box.run_all(list(programs.values()), [CHECK] * len(programs)), strict=True))
    assert [name for name, verdict in verdicts.items() if verdict.passed] == []
    words = ("NOT CONTAINED", "do not tell", "precious", "mounted", "nested")
    told = [n for n, verdict in verdicts.items() for line in verdict.output.splitlines() if line.startswith(words)]
    assert told == []
    assert processes_of(box) == []
    assert outside.visitors() == 0
    assert outside.left_behind() == []
    assert outside.sentinel.read_text() == "precious"
    assert outside.sentinel.stat().st_nlink == 1
    assert socket.gethostname() == host
    assert time.monotonic() - start < 60
    assert box.run(DOUBLE, CHECK).passed


@pytest.mark.parametrize("name", ["fork bomb that does not give up", "memory hogs side by side", "daemon"])
def test_the_kernel_takes_everything_along_when_the_time_is_up(namespace, name):
    box = sandbox("namespace", timeout=0.5)
    before = time.monotonic()
    assert not box.run(GREEDY[name], CHECK).passed
    assert time.monotonic() - before < 10
    assert processes_of(box) == []


def test_a_program_has_no_rights_and_sees_no_files(namespace):
    program = """
import os
print(os.getpid(), sorted(os.listdir('/dev')), os.listdir('/tmp'), os.path.exists('/etc'), os.path.exists('/proc'))
for path in ('/', '/lib', os.path.dirname(os.__file__)):
    try: open(os.path.join(path, 'new'), 'w')
    except OSError as error: print(error.strerror)
for attempt in (lambda: os.chroot('/tmp'), lambda: os.setuid(0), lambda: os.mknod('/tmp/x', 0o60600, 1)):
    try: attempt()
    except OSError as error: print(error.strerror)
import socket
print(socket.socket().connect_ex(('127.0.0.1', 1)) != 111)
try: socket.if_nameindex()
except OSError as error: print(error.strerror)
"""
    lines = namespace.run(program).output.splitlines()
    assert lines[0] == "1 ['null', 'shm', 'urandom', 'zero'] [] False False"
    assert lines[1:4] == ["Read-only file system"] * 3
    assert lines[4:7] == ["Operation not permitted"] * 3
    assert lines[7:] == ["True", "Operation not permitted"]


def test_files_do_not_last_from_one_program_to_the_next(namespace):
    program = "import os\nassert os.listdir('.') == [], os.listdir('.')\nopen('left', 'w').write('x')"
    assert [verdict.passed for verdict in namespace.run_all([program] * 3)] == [True] * 3
