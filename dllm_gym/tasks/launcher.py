"""The inside of :mod:`dllm_gym.tasks.sandbox`: supervises one generated program and says how it ended.

Started as a script of its own, ``python -P -s -S launcher.py``, because every program needs a fresh interpreter, and a
small one because 164 of them are started in a row: standard library only, nothing of dllm_gym.

    scorer -- supervisor -- (namespaces) -- worker
              reads from    pid 1's parent   runs the program, then the check

The supervisor never runs generated code. It gets frames on its standard input: settings, program, the check, the same
check changed so that only forgers pass, DECOYS times, and its own password; each check stands behind a secret of 16
bytes. It writes the password and how the program ended on one line, and the program's output. The program runs in new
namespaces each time: with the check, and, had it passed, with the others. A frame is read when it is needed, so that
no program finds what comes later in the memory that it got from the supervisor.
"""

from __future__ import annotations

import builtins
import ctypes
import marshal
import operator  # noqa: F401 (for the watch in the second check, which shall not get it from the program)
import os
import resource
import select
import sys
import time

TYPE_CHECKING = False  # typing and contextlib take longer to import than most programs run
if TYPE_CHECKING:
    from typing import Any

SECRET = 16  # bytes in front of a check; the worker gives them back once the check has passed
DECOYS = 2  # checks that only forgers pass; one that steals the secret now and then meets both
NOBODY = 65534
SETUP_SECONDS = 30.0
WATCH_SECONDS = 0.1  # between two looks at the memory of a program's processes
CHUNK = 1 << 16
MIB = 1 << 20
KILL = 9

# <sched.h>, <sys/mount.h>, <sys/prctl.h>
NEW_NAMESPACES = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # user mnt pid net ipc uts
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 8192, 16384, 1 << 18  # fmt: skip # noqa: E501
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 442, -100, 0x8000, 1, 2

# <linux/seccomp.h>, <linux/audit.h>: what is refused, per processor. Its name for audits; then keyctl, add_key,
# request_key, ptrace, bpf, userfaultfd, perf_event_open, process_vm_readv, process_vm_writev; last socket and
# socketpair, of which the families UNIX, INET and INET6 are left.
FILTERED = {
    "x86_64": (0xC000003E, 250, 248, 249, 101, 321, 323, 298, 310, 311, 41, 53),
    "aarch64": (0xC00000B7, 219, 217, 218, 117, 280, 282, 241, 270, 271, 198, 199),
}
IO_URING = [425, 426, 427]
FAMILIES = (1, 2, 10)
X32 = 0x40000000  # a second set of numbers for the same calls
PR_SET_SECCOMP, REFUSE, ALLOW = 22, 0x00050001, 0x7FFF0000  # EPERM

libc = ctypes.CDLL(None, use_errno=True)


# ---- the supervisor ----


def main() -> None:
    call("prctl", PR_SET_PDEATHSIG, KILL)  # the scorer is gone: so is everything below
    scorer = select.poll()
    scorer.register(1, 0)
    if scorer.poll(0):  # nobody reads any more: it went before we asked to be told
        os._exit(1)
    call("prctl", PR_SET_CHILD_SUBREAPER, 1)  # daemons of the program become our children
    call("prctl", PR_SET_DUMPABLE, 0)  # nobody reads or traces us
    settings = marshal.loads(take(0))
    program = take(0)
    ending, output = Attempt(settings, program).run()
    for _ in range(DECOYS):
        if ending == "passed" and Attempt(settings, program).run()[0] == "passed":
            ending = "forged: it also passed a check that nothing can pass"
    password = take(0)
    while more := take(0, end=b""):  # the checks that were not needed
        password = more
    os.write(1, password + ending.encode() + b"\n" + output)


class Attempt:
    """One run of the program in namespaces (or only limits) of its own, watched from outside."""

    def __init__(self, settings: dict[str, Any], program: bytes):
        self.settings, self.program = settings, program
        self.output, self.heard, self.unsent = b"", b"", b""
        self.secret: bytes | None = None
        down_read, self.down = os.pipe()
        self.up, up_write = os.pipe()
        self.out, out_write = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            try:
                inhabit(settings, (down_read, up_write, out_write))
            finally:
                os._exit(1)
        for end in (down_read, up_write, out_write):
            os.close(end)
        for end in (self.down, self.up, self.out):
            os.set_blocking(end, False)
        self.pidfd = os.pidfd_open(self.child)
        self.deadline = time.monotonic() + SETUP_SECONDS
        self.started = False

    def run(self) -> tuple[str, bytes]:
        """How it ended (``"passed"`` or why not), and what it wrote."""
        ending = None
        look = time.monotonic() + WATCH_SECONDS
        while ending is None:
            ended = self.listen()
            now = time.monotonic()
            if self.bad_words():
                ending = "meddled with the channel of the verdict"
            elif ended:
                ending = self.epitaph()
            elif now > self.deadline:
                ending = "timeout" if self.started else "sandbox: it did not start in time"
            elif now > look:
                ending = self.watch()
                look = time.monotonic() + WATCH_SECONDS
        self.clear()
        return ending, self.output

    def listen(self) -> bool:
        """Wait a moment for words and output of the worker; True once it has ended and nothing is left to read."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        poll.register(self.up, select.POLLIN)
        poll.register(self.out, select.POLLIN)
        if self.unsent:
            poll.register(self.down, select.POLLOUT)
        ready = {fd for fd, _ in poll.poll(1000 * WATCH_SECONDS)}
        said = read(self.up) if self.up in ready else b""
        written = read(self.out) if self.out in ready else b""
        self.output += written[: self.settings["output"] - len(self.output)]
        if said:
            self.heard += said
            self.answer()
        if self.down in ready and self.unsent:
            try:
                self.unsent = self.unsent[os.write(self.down, self.unsent) :]
            except BlockingIOError:
                pass
            except OSError:  # the worker has closed its end: it will never pass
                self.unsent = b""
        if not said and not written and (self.up in ready or self.out in ready):
            time.sleep(0.001)  # both ends may be closed long before the end
        return self.pidfd in ready and not said and not written

    def answer(self) -> None:
        """The talk: Unshared? here are your identities; Ready? the program; Loaded? the secret and the check."""
        if self.heard == b"U":
            give_identities(self.child)
            self.unsent += b"M"
        elif self.heard[-1:] == b"R" and not self.started:
            self.started = True
            self.heard = b""
            self.deadline = time.monotonic() + self.settings["timeout"]
            self.unsent += frame(self.program)
        elif self.heard == b"L" and self.started and self.secret is None:
            check = take(0)
            self.secret = check[:SECRET]
            self.heard = b""
            self.unsent += frame(check)

    def bad_words(self) -> bool:
        """Whether the worker has said something that is not the beginning of what comes next."""
        if not self.started:
            return False
        return not (b"L" if self.secret is None else self.secret).startswith(self.heard)

    def epitaph(self) -> str:
        status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        if not self.started:
            return f"sandbox: {self.heard.partition(b'E')[2].decode(errors='replace') or f'status {status}'}"
        if status == 0 and self.secret is not None and self.heard == self.secret:
            return "passed"
        return describe(status)

    def watch(self) -> str | None:
        """Why the program has to end now: its processes taken together are too large or too many."""
        processes = descendants(os.getpid())
        if sum(processes.values()) > self.settings["memory"] * MIB:
            return "memory"
        if len(processes) > self.settings["processes"] + 1:
            return "processes"
        return None

    def clear(self) -> None:
        """Kill whatever is left of it, daemons too."""
        while processes := descendants(os.getpid()):
            for pid in processes:
                try:
                    os.kill(pid, KILL)
                except ProcessLookupError:
                    continue
            bury()
        for end in (self.down, self.up, self.out, self.pidfd):
            os.close(end)


def bury() -> None:
    """Reap every child that has ended; wait a little for the others."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        time.sleep(0.001)
    except ChildProcessError:
        pass


def descendants(ancestor: int) -> dict[int, int]:
    """Pid -> bytes of resident memory, for all processes below ``ancestor``."""
    children: dict[int, list[int]] = {}
    memory = {}
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:  # it has just ended
            continue
        children.setdefault(int(fields[1]), []).append(int(name))
        memory[int(name)] = int(fields[21]) * resource.getpagesize()
    found: dict[int, int] = {}
    generation = children.get(ancestor, [])
    while generation:
        found |= {pid: memory[pid] for pid in generation}
        generation = [pid for parent in generation for pid in children.get(parent, [])]
    return found


def describe(status: int) -> str:
    """What a status other than success means.

    >>> describe(1), describe(3), describe(-11)
    ('failed', 'ended early with status 3', 'killed by signal 11')
    """
    status = 128 - status if status > 128 else status  # the parent of pid 1 reports a signal like a shell
    if status < 0:
        return f"killed by signal {-status}"
    return "failed" if status == 1 else f"ended early with status {status}"


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


# ---- the way in ----


def inhabit(settings: dict[str, Any], ends: tuple[int, int, int]) -> None:
    """Put this process into its cage, then do the work; never returns."""
    down, up, out = ends
    try:
        call("prctl", PR_SET_PDEATHSIG, KILL)
        call("prctl", PR_SET_DUMPABLE, 1)  # else only real root may map its users
        keep_only(down, up, out)
        new_keyring()
        if settings["namespaces"]:
            into_namespaces(down, up)
            empty_file_system(settings)
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
        else:
            folder = os.path.join(settings["folder"], os.urandom(8).hex())  # no number: runs look the same
            os.mkdir(folder)
            os.chdir(folder)
            os.environ["TMPDIR"] = folder
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        call("prctl", PR_SET_PDEATHSIG, KILL)  # again: a change of user clears it
        os.setsid()
        limit(settings)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.close(out)
        filter_calls()
    except BaseException as error:
        os.write(up, f"E{type(error).__name__}: {error}".encode())
        os._exit(1)
    sys.path += settings["packages"]
    sys.argv = ["solution.py"]
    work(down, up)


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


def into_namespaces(down: int, up: int) -> None:
    """Return as pid 1 of new namespaces; the process that came stays behind as its parent and ends with it."""
    call("unshare", NEW_NAMESPACES)
    os.write(up, b"U")
    if os.read(down, 1) != b"M":
        os._exit(1)
    put("/proc/sys/user/max_user_namespaces", "0")  # in a nested one the program could mount what it likes
    put("/proc/self/oom_score_adj", "1000")  # if memory gets short, this ends first
    worker = os.fork()
    if worker:
        os.close(up)
        status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        os._exit(status if status >= 0 else 128 - status)


def empty_file_system(settings: dict[str, Any]) -> None:
    """A root with nothing but the Python library (read-only), three devices and an empty /tmp."""
    base = "/proc"  # a folder that always exists; nothing that is shown lies below it
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    # First of all, since the library may itself lie below /tmp. (Locks are in /dev/shm.)
    for folder, room in (("/tmp", settings["disk"]), ("/dev/shm", settings["file_size"])):
        os.makedirs(base + folder)
        mount("tmpfs", base + folder, "tmpfs", MS_NOSUID | MS_NODEV, f"size={room}m,nr_inodes=1024,mode=1777")
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    for shown in settings["shown"]:
        os.makedirs(base + shown, exist_ok=True)
        mount(shown, base + shown, None, MS_BIND | MS_REC)
        call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, (base + shown).encode(), AT_RECURSIVE, read_only, ctypes.sizeof(read_only))  # fmt: skip # noqa: E501
    for hidden in settings["hidden"]:
        if os.path.isdir(base + hidden):
            mount("tmpfs", base + hidden, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k")
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        os.close(os.open(base + device, os.O_CREAT))
        mount(device, base + device, None, MS_BIND)
    mount(None, base, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(base)
    mount(base, "/", None, MS_MOVE)
    os.chroot(".")
    os.chdir("/tmp")


def limit(settings: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_AS: settings["memory"] * MIB,
        resource.RLIMIT_CPU: int(settings["timeout"]) + 1,
        resource.RLIMIT_FSIZE: settings["file_size"] * MIB,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    limits[resource.RLIMIT_NPROC] = settings["processes"] + (0 if settings["namespaces"] else tasks_of_user())
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def tasks_of_user() -> int:
    """How many processes and threads this user has; outside of namespaces the limit counts them all."""
    total = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdecimal() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                total += len(os.listdir(f"/proc/{name}/task"))
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
    sockets, refused = refused[-2:], [*IO_URING, *refused[:-2]]
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


def work(down: int, up: int) -> None:
    """Run the program, then the check, in one module; say the secret if both went through. Never returns.

    Everything needed after the program has run is held in local variables: the program may replace what it likes.
    """
    fetch, hear, say, leave, execute, build, end = take, os.read, os.write, os._exit, exec, compile, BaseException
    system, blank, complain = sys, type(sys), sys.__excepthook__
    streams = [stream for stream in (sys.__stdout__, sys.__stderr__) if stream]
    scope = vars(builtins)
    original = dict(scope)
    module = blank("solution")
    sys.modules.update(solution=module, __main__=blank("__main__"))
    names, modules, state = vars(module), dict(sys.modules), 1
    try:
        say(up, b"R")
        execute(build(fetch(down, hear), "solution.py", "exec"), names)
        say(up, b"L")
        secret = fetch(down, hear)
        system.settrace(None)
        system.setprofile(None)
        scope.update(original)
        names["__builtins__"] = builtins
        system.modules.update(modules)
        execute(build(secret[SECRET:], "check.py", "exec"), names)
        say(up, secret[:SECRET])
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


def take(fd: int, hear: Any = os.read, end: bytes | None = None) -> bytes:
    """The content of the next frame; nothing beyond it is read. Where there is none, ``end``, if given."""
    content = b""
    for size in (4, None):
        size = size or int.from_bytes(content, "little")
        content = b""
        while len(content) < size:
            more = hear(fd, size - len(content))
            if not more and end is not None:
                return end
            if not more:
                raise EOFError("the other side is gone")
            content += more
    return content


def read(fd: int) -> bytes:
    try:
        return os.read(fd, CHUNK)
    except BlockingIOError:
        return b""


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
