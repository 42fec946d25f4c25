"""The inside of :mod:`dllm_gym.tasks.sandbox`: runs generated programs in cages and says how each ended.

Started once per sandbox as a script, ``python -P -s -S cage.py SETTINGS``, standard library only: what has been
imported here, every program finds there already, since it runs in a fork.

    scorer -- nursery -- supervisor -- (namespaces) -- init -- worker
              forks      watches one                   pid 1   runs the program,
              on demand  program                       reaps   then the check

Only the worker runs generated code. A request is a socket that comes over the nursery's standard input, with three
frames to read: a folder (without namespaces), the program, the check. A frame with the verdict goes back. If the scorer
dies, however suddenly, the nursery sees it (a pidfd), the supervisor sees it (its socket hangs up) and dies with the
nursery (``PR_SET_PDEATHSIG``), init dies with the supervisor, and with init the kernel ends all that is in its process
namespace: nothing of this lies within a program's reach.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

SECRET = 16  # bytes that the worker gets with the check, and gives back once the check has passed
NOBODY = 65534
SETUP_SECONDS = 60.0
PATIENCE = 8  # wall time allowed, in multiples of the processor time: other programs run, too
WATCH_SECONDS = 0.05  # between two looks at the processes of a program
WATCH_SHARE = 0.05  # of the time may go into looking
THREAD_STACK = 2 << 20
ADDRESSES = 4  # address space allowed, in multiples of the memory
CHUNK = 1 << 16
MIB = 1 << 20
KILL = 9
TICKS = os.sysconf("SC_CLK_TCK")
FOLDERS = ("/tmp", "/src", "/dev/shm")  # what a program may write into: where it starts, its files, shared memory

# <sched.h>, <sys/mount.h>, <sys/prctl.h>, <linux/sockios.h>
NEW_NAMESPACES = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # user mnt pid net ipc uts
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 4096, 8192, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 442, -100, 0x8000, 1, 2
SIOCSIFFLAGS, IFF_UP = 0x8914, 1

# <linux/seccomp.h>, <linux/audit.h>: what is refused, per processor. Its name for audits; then keyctl, add_key,
# request_key, ptrace, bpf, userfaultfd, perf_event_open, process_vm_readv, process_vm_writev; memory that no limit
# counts: shmget, semget, msgget, memfd_create; last socket and socketpair, of which the families UNIX, INET and INET6
# are left.
FILTERED = {
    "x86_64": (0xC000003E, 250, 248, 249, 101, 321, 323, 298, 310, 311, 29, 64, 68, 319, 41, 53),
    "aarch64": (0xC00000B7, 219, 217, 218, 117, 280, 282, 241, 270, 271, 194, 190, 186, 279, 198, 199),
}
EVERYWHERE = [425, 426, 427, 447]  # io_uring, memfd_secret
FAMILIES = (1, 2, 10)
X32 = 0x40000000  # a second set of numbers for the same calls
PR_SET_SECCOMP, REFUSE, ALLOW = 22, 0x00050001, 0x7FFF0000  # EPERM

libc = ctypes.CDLL(None, use_errno=True)


# ---- the nursery ----


def main() -> None:
    scorer = os.getppid()
    settings = json.loads(sys.argv[1])
    nursery = Nursery(settings, os.pidfd_open(scorer))
    if scorer == settings["scorer"] == os.getppid():  # else it went before we looked
        nursery.serve()
    end_all()
    os._exit(0)


class Nursery:
    """Forks a supervisor for every request, and ends when the scorer does or hangs up."""

    def __init__(self, settings: dict[str, Any], scorer: int):
        self.settings, self.scorer = settings, scorer
        self.requests = socket.socket(fileno=os.dup(0))
        os.dup2(os.open("/dev/null", os.O_RDWR), 0)
        self.running: dict[int, tuple[int, int]] = {}  # pidfd of a supervisor -> (its pid, its line to the scorer)
        call("prctl", PR_SET_CHILD_SUBREAPER, 1)  # should a program end its supervisor, what it started comes to us
        call("prctl", PR_SET_DUMPABLE, 0)  # nobody reads or traces us
        small_stacks()
        prepare_interpreter(settings)
        self.requests.send(b"R")

    def serve(self) -> None:
        while True:
            poll = select.poll()
            for fd in (self.scorer, self.requests.fileno(), *self.running):
                poll.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            if self.scorer in ready:
                return
            for pidfd in ready & set(self.running):
                self.bury(pidfd)
            if self.requests.fileno() in ready:
                lines = socket.recv_fds(self.requests, 1, 1)[1]
                if not lines:
                    return
                self.start(lines[0])

    def start(self, line: int) -> None:
        ours, theirs = socket.socketpair()
        nursery = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                self.requests.close()
                supervise(self.settings, line, theirs, nursery)
            finally:
                os._exit(1)
        theirs.close()
        self.running[os.pidfd_open(pid)] = pid, line
        with ours:
            if self.settings["namespaces"] and ours.recv(1):
                try:
                    give_identities(pid)
                    ours.send(b"M")
                except OSError as error:
                    ours.send(str(error).encode())

    def bury(self, pidfd: int) -> None:
        """A supervisor has ended; if it has not said how its program did, say it."""
        pid, line = self.running.pop(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != 0 and not self.settings["namespaces"]:
            self.end_strangers()
        if status < 0 and not self.settings["namespaces"]:
            send(line, b"it attacked its supervisor\n")
        elif status:
            send(line, f"sandbox: the supervisor ended with status {status}\n".encode())
        os.close(line)
        os.close(pidfd)

    def end_strangers(self) -> None:
        """Kill the children that are no supervisors: what a program has left that ended its own."""
        known = {pid for pid, _ in self.running.values()}
        while strangers := [p.pid for p in processes() if p.parent == os.getpid() and p.pid not in known]:
            for pid in strangers:
                os.kill(pid, KILL)
                os.waitpid(pid, 0)  # its children become ours


def prepare_interpreter(settings: dict[str, Any]) -> None:
    """What all programs find: ``exit`` and its like, modules that most import, the path, the cores they may use."""
    import site

    site.setquit()
    site.setcopyright()
    site.sethelper()
    sys.path += settings["packages"]
    sys.argv = ["solution.py"]
    sys.dont_write_bytecode = True
    sys.executable = sys._base_executable = settings["python"]  # type: ignore[attr-defined]
    cores = settings["cores"]
    os.cpu_count = lambda: cores
    for name in settings["preload"]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import gc

    gc.freeze()


def small_stacks() -> None:
    """Threads get 2 MiB of stack (unless a program asks for another size): else 64 of them fill the memory."""
    attributes = ctypes.create_string_buffer(256)
    if hasattr(libc, "pthread_setattr_default_np"):
        libc.pthread_attr_init(attributes)
        libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(THREAD_STACK))
        libc.pthread_setattr_default_np(attributes)


def give_identities(pid: int) -> None:
    """Map users for a process that has made a user namespace.

    Real root would keep the rights of root over files and be exempt from the limit on processes, so the program gets
    to be nobody; anyone else stays who they are.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        users = groups = f"0 0 1\n{NOBODY} {NOBODY} 1\n"
    else:
        users, groups = f"{uid} {uid} 1\n", f"{gid} {gid} 1\n"
        put(f"/proc/{pid}/setgroups", "deny")
    put(f"/proc/{pid}/uid_map", users)
    put(f"/proc/{pid}/gid_map", groups)


# ---- the supervisor ----


def supervise(settings: dict[str, Any], line: int, nursery: socket.socket, parent: int) -> None:
    """Read a request from ``line``, run it, and write the verdict there; never returns."""
    call("prctl", PR_SET_PDEATHSIG, KILL)
    if os.getppid() != parent:
        os._exit(1)
    try:
        if settings["namespaces"]:
            into_namespaces(nursery, parent)
        else:
            call("prctl", PR_SET_CHILD_SUBREAPER, 1)  # daemons of the program become our children
        settings = {**settings, "folder": take(line).decode()}
        attempt = Attempt(settings, take(line), line)
        attempt.check = take(line)
        ending, output = attempt.run(), attempt.output
    except Exception as error:
        ending, output = f"sandbox: {type(error).__name__}: {error}", b""
    send(line, ending.encode(errors="replace") + b"\n" + output)
    os._exit(0)


class Attempt:
    """One program in a cage, watched from outside."""

    check: bytes

    def __init__(self, settings: dict[str, Any], program: bytes, line: int):
        self.settings, self.line = settings, line
        self.output, self.heard, self.unsent = b"", b"", b""
        self.started = self.loaded = False
        down_read, self.down = os.pipe()
        self.up, up_write = os.pipe()
        self.out, out_write = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            try:
                inhabit(settings, program, (down_read, up_write, out_write))
            finally:
                os._exit(1)
        for end in (down_read, up_write, out_write):
            os.close(end)
        self.secret = os.urandom(SECRET)
        os.set_blocking(self.down, False)
        self.pidfd = os.pidfd_open(self.child)
        self.poll = select.poll()
        for end in (self.pidfd, self.up, self.out):
            self.poll.register(end, select.POLLIN)
        self.poll.register(line, 0)  # tells when it hangs up
        self.deadline = time.monotonic() + SETUP_SECONDS

    def run(self) -> str:
        """How it ended: ``"passed"`` or why not."""
        ending = None
        look = time.monotonic() + WATCH_SECONDS
        while ending is None:
            ended = self.listen()
            now = time.monotonic()
            if self.started and not (self.secret if self.loaded else b"L").startswith(self.heard):
                ending = "meddled with the channel of the verdict"
            elif ended:
                ending = self.epitaph()
            elif now > self.deadline:
                ending = "timeout" if self.started else "sandbox: it did not start in time"
            elif now > look:
                ending = self.watch()
                after = time.monotonic()
                look = after + max(WATCH_SECONDS, (after - now) / WATCH_SHARE)
        self.clear()
        return ending

    def listen(self) -> bool:
        """Wait a moment for words and output of the worker; True once it has ended and nothing is left to read."""
        ready = {fd for fd, _ in self.poll.poll(1000 * WATCH_SECONDS)}
        if self.line in ready:  # the scorer is gone, and nobody wants to know
            self.clear()
            os._exit(0)
        said = self.read(self.up) if self.up in ready else b""
        written = self.read(self.out) if self.out in ready else b""
        self.output += written[: self.settings["output"] - len(self.output)]
        if said:
            self.heard += said
            self.answer()
        if self.down in ready:
            self.send()
        return self.pidfd in ready and not said and not written

    def read(self, fd: int) -> bytes:
        """What has been written; a pipe that all have closed is not looked at again."""
        content = os.read(fd, CHUNK)
        if not content:
            self.poll.unregister(fd)
        return content

    def send(self) -> None:
        try:
            self.unsent = self.unsent[os.write(self.down, self.unsent) :]
        except BlockingIOError:
            return
        except OSError:  # the worker has closed its end: it will never pass
            self.unsent = b""
        if not self.unsent:
            self.poll.unregister(self.down)

    def answer(self) -> None:
        """Ready? then the time runs. Loaded? here is the check, and the secret to say when it has passed."""
        if self.heard.startswith(b"R") and not self.started:
            self.started, self.heard = True, self.heard[1:]
            self.deadline = time.monotonic() + PATIENCE * self.settings["timeout"]
        if self.heard == b"L" and self.started and not self.loaded:
            self.loaded, self.heard, self.unsent = True, b"", frame(self.secret + self.check)
            self.poll.register(self.down, select.POLLOUT)

    def epitaph(self) -> str:
        status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        if not self.started:
            return f"sandbox: {self.heard.partition(b'E')[2].decode(errors='replace') or f'status {status}'}"
        if status == 0 and self.loaded and self.heard == self.secret:
            return "passed"
        return describe(status)

    def watch(self) -> str | None:
        """Why the program has to end now: its processes taken together ran too long, are too large or too many."""
        found = descendants(os.getpid())
        if sum(process.seconds for process in found) > self.settings["timeout"]:
            return "timeout"
        most = self.settings["memory"] * MIB
        if sum(process.memory for process in found) > most and sum(process.share() for process in found) > most:
            return "memory"
        if sum(process.threads for process in found) > self.settings["processes"] + 1:
            return "processes"
        return None

    def clear(self) -> None:
        """Kill whatever is left of it, daemons too."""
        if not self.settings["namespaces"]:
            return end_all()
        try:  # init takes all others along
            signal.pidfd_send_signal(self.pidfd, KILL)
            os.waitpid(self.child, 0)
        except (ProcessLookupError, ChildProcessError):
            return None


def end_all() -> None:
    """Kill all descendants and reap them."""
    while found := descendants(os.getpid()):
        for process in found:
            try:
                os.kill(process.pid, KILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.001)
        except ChildProcessError:
            continue


class Process:
    """What ``/proc/PID/stat`` says: seconds of processor time (ended children's, too), bytes that are resident."""

    def __init__(self, stat: bytes):
        fields = stat.rpartition(b")")[2].split()
        self.pid, self.parent = int(stat.split()[0]), int(fields[1])
        self.seconds = sum(map(int, fields[11:15])) / TICKS
        self.threads = int(fields[17])
        self.memory = int(fields[21]) * resource.getpagesize()

    def share(self) -> int:
        """Bytes that are resident, of which those that several processes share count in part; slow."""
        try:
            with open(f"/proc/{self.pid}/smaps_rollup", "rb") as file:
                return 1024 * sum(int(line.split()[1]) for line in file if line.startswith(b"Pss:"))
        except OSError:
            return self.memory


def processes() -> list[Process]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    found.append(Process(file.read()))
            except OSError:  # it has just ended
                continue
    return found


def descendants(ancestor: int) -> list[Process]:
    """All processes below ``ancestor``."""
    children: dict[int, list[Process]] = {}
    for process in processes():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    generation = children.get(ancestor, [])
    while generation:
        found += generation
        generation = [child for process in generation for child in children.get(process.pid, [])]
    return found


def describe(status: int) -> str:
    """What a status other than success means.

    >>> describe(1), describe(3), describe(-11), describe(-24)
    ('failed', 'ended early with status 3', 'killed by signal 11', 'timeout')
    """
    status = 128 - status if status > 128 else status  # init reports a signal like a shell
    if status == -signal.SIGXCPU:
        return "timeout"
    if status < 0:
        return f"killed by signal {-status}"
    return "failed" if status == 1 else f"ended early with status {status}"


# ---- the way in ----


def into_namespaces(nursery: socket.socket, parent: int) -> None:
    """Move to new namespaces (for processes: with the next child), where this process has the rights of root."""
    call("prctl", PR_SET_DUMPABLE, 1)  # else only real root may map its users
    call("unshare", NEW_NAMESPACES)
    nursery.send(b"U")
    said = nursery.recv(1000)
    if said != b"M":
        raise OSError(f"no users for the namespace: {said.decode(errors='replace')}")
    put("/proc/sys/user/max_user_namespaces", "0")  # in a nested one the program could mount what it likes
    put("/proc/self/oom_score_adj", "1000")  # if memory gets short, the program ends first
    call("prctl", PR_SET_DUMPABLE, 0)
    call("prctl", PR_SET_PDEATHSIG, KILL)  # again: new rights may clear it
    if os.getppid() != parent:
        os._exit(1)


def inhabit(settings: dict[str, Any], program: bytes, ends: tuple[int, int, int]) -> None:
    """Put this process into its cage, then do the work; never returns."""
    down, up, out = ends
    source = "/src"
    try:
        keep_only(down, up, out)
        new_keyring()
        if settings["namespaces"]:
            empty_file_system(settings)
            loopback()
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
        else:
            source = own_folder(settings["folder"])
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        call("prctl", PR_SET_PDEATHSIG, KILL)  # (a change of user would clear it)
        supervisor = select.poll()
        supervisor.register(up, 0)
        if supervisor.poll(0):  # it went before we asked to be told
            os._exit(1)
        filter_calls()
        if settings["namespaces"]:
            be_init(up)
        call("prctl", PR_SET_DUMPABLE, 1)  # the supervisor looks at its memory
        limit(settings)
        os.setsid()
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.close(out)
    except BaseException as error:
        os.write(up, f"E{type(error).__name__}: {error}".encode())
        os._exit(1)
    sys.path.insert(0, source)
    work(os.path.join(source, "solution.py"), program, down, up)


def be_init(up: int) -> None:
    """Return in a child; pid 1 stays here, out of reach of signals from its namespace, until the child has ended.

    It has no limits of its own that a program may use up, but may be killed at any time: all others then die with it.
    """
    worker = os.fork()
    if worker:
        os.closerange(0, up + 1024)
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == worker:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)


def own_folder(folder: str) -> str:
    """Where there are no namespaces: a folder to start in, and one for the program's files, which is returned."""
    source, start = os.path.join(folder, "src"), os.path.join(folder, "tmp")
    os.mkdir(source)
    os.mkdir(start)
    os.chdir(start)
    os.environ["TMPDIR"] = os.environ["HOME"] = start
    return source


def keep_only(*fds: int) -> None:
    """Close every descriptor but 0, 1, 2 and ``fds``; 0 and 1 become the null device, so that nothing leads out."""
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    low = 3
    for fd in sorted(fds):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, max(low, resource.getrlimit(resource.RLIMIT_NOFILE)[0]))


def empty_file_system(settings: dict[str, Any]) -> None:
    """A root with nothing but what is shown (read-only), a few devices, three files in /etc, and FOLDERS."""
    base = "/proc"  # a folder that always exists; nothing that is shown lies below it
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    # First of all, since the library may itself lie below /tmp. (Locks are in /dev/shm.)
    for folder, room in zip(FOLDERS, (settings["disk"], settings["file_size"], settings["file_size"]), strict=True):
        os.makedirs(base + folder)
        mount("tmpfs", base + folder, "tmpfs", MS_NOSUID | MS_NODEV, f"size={room}m,nr_inodes=4096,mode=1777")
    for link, target in settings["links"]:
        os.symlink(target, base + link)
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    for shown in settings["shown"]:
        if os.path.isdir(shown):
            os.makedirs(base + shown, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(base + shown), exist_ok=True)
            os.close(os.open(base + shown, os.O_CREAT))
        mount(shown, base + shown, None, MS_BIND | MS_REC)
        place = (base + shown).encode()
        call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, place, AT_RECURSIVE, read_only, ctypes.sizeof(read_only))
    for hidden in settings["hidden"]:
        if os.path.isdir(base + hidden):
            mount("tmpfs", base + hidden, "tmpfs", MS_NOSUID | MS_NODEV, "size=4k,mode=755")
            put(f"{base}{hidden}/__init__.py", "raise ModuleNotFoundError('this package is not shown to programs')")
            mount(None, base + hidden, None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    for device in ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"):
        os.close(os.open(base + device, os.O_CREAT))
        mount(device, base + device, None, MS_BIND)
    users(base)
    mount(None, base, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(base)
    mount(base, "/", None, MS_MOVE)
    os.chroot(".")
    os.chdir("/tmp")


def users(base: str) -> None:
    """The files that name the user, its group and the host."""
    uid, gid = (NOBODY, NOBODY) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.mkdir(f"{base}/etc")
    put(f"{base}/etc/passwd", f"nobody:x:{uid}:{gid}:nobody:/tmp:/bin/sh\n")
    put(f"{base}/etc/group", f"nogroup:x:{gid}:\n")
    put(f"{base}/etc/hosts", "127.0.0.1 localhost sandbox\n::1 localhost sandbox\n")


def loopback() -> None:
    """Let the program talk to itself: a network with nothing but 127.0.0.1, and a host name."""
    import fcntl

    socket.sethostname("sandbox")
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))


def limit(settings: dict[str, Any]) -> None:
    memory, seconds = settings["memory"] * MIB, int(settings["timeout"]) + 1
    limits = {
        resource.RLIMIT_DATA: (memory, memory),
        resource.RLIMIT_AS: (ADDRESSES * memory, ADDRESSES * memory),
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_FSIZE: (settings["file_size"] * MIB,) * 2,
        resource.RLIMIT_NOFILE: (settings["files"],) * 2,
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
        resource.RLIMIT_NPROC: (settings["processes"] + (1 if settings["namespaces"] else tasks_of_user()),) * 2,
    }
    for which, values in limits.items():
        most = resource.getrlimit(which)[1]
        resource.setrlimit(which, values if most == resource.RLIM_INFINITY else tuple(min(v, most) for v in values))


def tasks_of_user() -> int:
    """How many processes and threads this user has; outside of namespaces the limit counts them all."""
    total = 0
    for process in processes():
        try:
            if os.stat(f"/proc/{process.pid}").st_uid == os.getuid():
                total += process.threads
        except OSError:  # it has just ended
            continue
    return total


def new_keyring() -> None:
    """Leave the keys of the user's session; where this is not allowed, the filter keeps the program from all keys."""
    if os.uname().machine in FILTERED:
        libc.syscall(FILTERED[os.uname().machine][1], 1, None)  # KEYCTL_JOIN_SESSION_KEYRING, nameless


def filter_calls() -> None:
    """Refuse, for ever, system calls that reach beyond namespaces and limits: see FILTERED.

    A classic BPF program over (number, architecture, pointer, arguments). Another processor has no filter.
    """
    if os.uname().machine not in FILTERED:
        return
    architecture, *refused = FILTERED[os.uname().machine]
    sockets, refused = refused[-2:], [*EVERYWHERE, *refused[:-2]]
    load, equal, above, leave = 0x20, 0x15, 0x35, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (leave, 0, 0, REFUSE)]
    code += [(load, 0, 0, 0), (above, 0, 1, X32), (leave, 0, 0, REFUSE)]
    for number in refused:
        code += [(equal, 0, 1, number), (leave, 0, 0, REFUSE)]
    code += [(equal, 2, 0, sockets[0]), (equal, 1, 0, sockets[1]), (leave, 0, 0, ALLOW), (load, 0, 0, 16)]
    for family in FAMILIES:
        code += [(equal, 0, 1, family), (leave, 0, 0, ALLOW)]
    code += [(leave, 0, 0, REFUSE)]
    packed = b"".join(
        kind.to_bytes(2, "little") + bytes((yes, no)) + value.to_bytes(4, "little") for kind, yes, no, value in code
    )
    text = ctypes.create_string_buffer(packed)
    address = ctypes.addressof(text).to_bytes(8, "little")
    call("prctl", PR_SET_SECCOMP, 2, len(code).to_bytes(8, "little") + address, 0, 0)


# ---- the work ----


def work(path: str, program: bytes, down: int, up: int) -> None:
    """Load the program as module ``solution``, then run the check in it; say the secret if both went through.

    Everything needed after the program has run is held in local variables: a program may replace what it likes. Never
    returns.
    """
    fetch, hear, say, leave, execute, build, end = take, os.read, os.write, os._exit, exec, compile, BaseException
    complain = sys.__excepthook__
    streams = [stream for stream in (sys.__stdout__, sys.__stderr__) if stream]
    state = 1
    try:
        with open(path, "wb") as file:  # (for inspect, tracebacks, pickle, reload and new interpreters)
            file.write(program)
        spec = spec_from_file_location("solution", path)
        assert spec
        module = module_from_spec(spec)
        sys.modules.update(solution=module, __main__=type(sys)("__main__"))
        names = vars(module)
        say(up, b"R")
        execute(build(program, path, "exec", 0, True), names)
        say(up, b"L")
        check = fetch(down, hear)
        execute(build(check[SECRET:], "check.py", "exec", 0, True), names)
        say(up, check[:SECRET])
        state = 0
    except end as error:
        tail = error.__traceback__ and error.__traceback__.tb_next  # without this frame
        complain(type(error), end.with_traceback(error, tail), tail)
    finally:
        try:
            for stream in streams:
                stream.flush()
        finally:
            leave(state)


# ---- tools ----


def frame(content: bytes) -> bytes:
    """``content`` behind its length.

    >>> frame(b"abc")
    b'\\x03\\x00\\x00\\x00abc'
    """
    return len(content).to_bytes(4, "little") + content


def take(fd: int, hear: Any = os.read) -> bytes:
    """The content of the next frame; nothing beyond it is read.

    Raises:
        EOFError: the other side is gone.
    """
    content = b""
    for size in (4, None):
        size = size or int.from_bytes(content, "little")
        content = b""
        while len(content) < size:
            more = hear(fd, size - len(content))
            if not more:
                raise EOFError("the other side is gone")
            content += more
    return content


def send(line: int, verdict: bytes) -> None:
    """Write a frame, whole; nothing happens if nobody reads any more."""
    rest = frame(verdict)
    try:
        while rest:
            rest = rest[os.write(line, rest) :]
    except OSError:
        return


def put(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    call("mount", *encoded[:3], ctypes.c_ulong(flags), encoded[3])


def call(function: str, *arguments: Any) -> None:
    """A function of the C library.

    Raises:
        OSError: it failed.
    """
    if getattr(libc, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}{arguments[:2]}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
