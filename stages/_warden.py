"""The warden of `sandbox.py`: runs in a process of its own, started from this text, with the standard library alone.

    python -P -s -S -c <this file> LEVEL FOLDER LIMITS     tasks on stdin, outcomes on stdout, one JSON line each
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback

NOBODY = 65534
PRELOADED = "bisect collections functools heapq itertools math operator re string"  # imported once, before the forks

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 0x1000, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the number is the same on every architecture
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, MNT_DETACH = 1, 38, 2
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
RESULTS = 3  # the descriptor on which a program's child tells its results


def visible() -> list[str]:
    """What a program may read: the interpreter and the system's shared libraries."""
    found = [sys.base_prefix, "/usr/lib", "/usr/lib64", "/lib", "/lib64"]
    unique = sorted({p for p in found if os.path.isdir(p)}, key=len)
    return [p for i, p in enumerate(unique) if not any(p.startswith(q + "/") for q in unique[:i])]


class Kernel:
    """The system calls that Python 3.11 has no function for. Each raises OSError."""

    def __init__(self) -> None:
        import ctypes  # not at the top: its reader, the caller's side, needs no ctypes

        self.ctypes, self.libc = ctypes, ctypes.CDLL(None, use_errno=True)

    def call(self, name: str, *values: object) -> None:
        values = tuple(v.encode() if isinstance(v, str) else v for v in values)
        if getattr(self.libc, name)(*values) != 0:
            raise OSError(self.ctypes.get_errno(), f"{name}{values}: {os.strerror(self.ctypes.get_errno())}")

    def mount(self, source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
        self.call("mount", source, target, kind, self.ctypes.c_ulong(flags), data)

    def read_only(self, path: str) -> None:
        attributes = (self.ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
        self.call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path, AT_RECURSIVE, attributes, 32)

    def drop_capabilities(self) -> None:
        header = (self.ctypes.c_uint32 * 2)(0x20080522, 0)
        self.call("capset", header, (self.ctypes.c_uint32 * 6)())


def warden(level: str, folder: str, limits: dict[str, float]) -> None:
    """Reads tasks from stdin, answers each with one outcome line on stdout, in order."""
    tasks, answers, null = os.fdopen(os.dup(0), encoding="utf-8"), os.dup(1), os.open("/dev/null", os.O_RDWR)
    os.environ.clear()  # what bwrap or Python's start has put there
    kernel = Kernel()
    kernel.call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for name in PRELOADED.split():
        __import__(name)
    home, pid_namespace = _walls(kernel, level, folder)
    compile("0", "", "eval")  # its first call in a process builds the types of the syntax tree: 2 ms
    gc.freeze()  # a collection in a child would touch, and so copy, all of the warden's objects
    for task in tasks:
        source, calls = json.loads(task)
        outcome = _supervise(kernel, pid_namespace, home, null, source, calls, limits)
        os.write(answers, json.dumps(outcome).encode() + b"\n")
        if os.listdir(home):
            _clean(kernel, home, pid_namespace >= 0)


def _walls(kernel: Kernel, level: str, folder: str) -> tuple[str, int]:
    """Puts this process behind the walls of its level: the programs' working directory, and this pid namespace or -1."""
    if level == "rlimits":
        home = os.path.join(folder, "home")
        os.mkdir(home)
        os.chmod(home, 0o777)
        return home, -1
    if level == "namespaces":
        _enter_namespaces(kernel, folder)
        pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)
        os.chroot(folder)
    elif level == "bubblewrap" and os.geteuid() != 0 and os.getpid() < 10:  # in bwrap's own pid namespace, or nowhere
        pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)
        kernel.call("umount2", "/proc", MNT_DETACH)
    else:
        raise RuntimeError(f"level {level!r} can't be built by uid {os.geteuid()} as process {os.getpid()}")
    return "/tmp", pid_namespace


def _enter_namespaces(kernel: Kernel, folder: str) -> None:
    """Own namespaces and, under `folder`, the root that the programs will see. Goes on as pid 1 of a pid namespace."""
    uid, gid = os.geteuid(), os.getegid()
    kernel.call("unshare", 0 if uid == 0 else CLONE_NEWUSER)
    if uid != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    kernel.call("unshare", CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWPID)
    # System V memory outlives a process and no rlimit counts it; in this new namespace there is none (best effort:
    # /proc/sys may be read-only).
    for name in ("shmmax", "msgmni"):
        try:
            with open(f"/proc/sys/kernel/{name}", "w") as file:
                file.write("0")
        except OSError:
            pass
    kernel.mount("none", "/", None, MS_REC | MS_PRIVATE)
    kernel.mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in visible():
        os.makedirs(folder + path)
        kernel.mount(path, folder + path, None, MS_BIND | MS_REC)
    os.mkdir(folder + "/tmp")
    os.mkdir(folder + "/dev")
    for path in DEVICES:
        open(folder + path, "w").close()
    kernel.read_only(folder)
    for path in DEVICES:
        kernel.mount(path, folder + path, None, MS_BIND)
    kernel.mount("tmpfs", folder + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,mode=1777")
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    kernel.call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _clean(kernel: Kernel, home: str, walls: bool) -> None:
    """An empty working directory for the next program, whatever the last one left there."""
    if walls:
        kernel.call("umount2", home, MNT_DETACH)
        kernel.mount("tmpfs", home, "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,mode=1777")
    else:
        for name in os.listdir(home):
            path = os.path.join(home, name)
            shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)


def _supervise(
    kernel: Kernel, pid_namespace: int, home: str, null: int, source: str, calls: list[str], limits: dict[str, float]
) -> dict[str, object]:
    """One program in a child of its own; kills it, and all it started, when it has answered or its time is over."""
    pipes = [os.pipe() for _ in range(3)]  # what it prints, what it tells, and one that closes when it ends
    (output, output_end), (results, results_end), (alive, alive_end) = pipes
    os.set_blocking(output_end, False)  # a full pipe is the limit of output: the write fails, nobody waits
    os.set_blocking(results_end, False)
    if pid_namespace >= 0:
        kernel.call("unshare", CLONE_NEWPID)  # the next fork is pid 1 of a new namespace: when it dies, all there die
    child = os.fork()
    if child == 0:
        for place, descriptor in enumerate((null, output_end, output_end, results_end, alive_end)):
            os.dup2(descriptor, place)
        os.closerange(RESULTS + 2, 256)
        try:
            _confine(kernel, home, pid_namespace >= 0, limits)
        except BaseException as error:
            _tell("failed", _reason(error))
            os._exit(1)
        _execute(source, calls)
    for _, end in pipes:
        os.close(end)
    if pid_namespace >= 0:
        kernel.call("setns", pid_namespace, CLONE_NEWPID)
    late = _wait(child, alive, limits)
    try:
        os.killpg(child, signal.SIGKILL)
    except OSError:  # gone already, or killed before it had a group
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    told, printed = (_drain(descriptor) for descriptor in (results, output))
    os.close(alive)
    return _outcome(told, printed, late or status == signal.SIGXCPU, len(calls))


def _wait(child: int, alive: int, limits: dict[str, float]) -> bool:
    """Until the program ends (False) or a limit does (True). CPU time decides, so that a busy machine changes no
    verdict; the wall is for those who sleep."""
    clock = (~child << 3) | 2  # Linux's CPU clock of another process, as clock_getcpuclockid(3) makes it
    start, patience = time.monotonic(), 0.05
    while not select.select([alive], [], [], patience)[0]:
        if time.clock_gettime(clock) > limits["seconds"] or time.monotonic() - start > limits["wall_seconds"]:
            return True
    return False


def _drain(descriptor: int) -> bytes:
    """What a dead program left in a pipe."""
    text = b""
    while block := os.read(descriptor, 1 << 20):
        text += block
    os.close(descriptor)
    return text


def _outcome(results: bytes, output: bytes, late: bool, calls: int) -> dict[str, object]:
    state, values, error = "timeout" if late else "killed", [], ""
    for number, line in enumerate(results.decode(errors="replace").splitlines()):
        try:
            key, text = map(str, json.loads(line))
        except (ValueError, TypeError):  # cut off, or written by the program itself
            continue
        if number == 0 and key == "failed":
            raise RuntimeError(f"a program could not be confined: {text}")
        if key == "end":
            state, error = ("error", text) if text else ("ok", error)
        elif key in ("value", "raised"):
            values.append(text if key == "value" else None)
            error = error or (text if key == "raised" else "")
    values = (values + [None] * calls)[:calls]
    return {"status": state, "values": values, "output": output.decode(errors="replace"), "error": error}


# What follows runs in the program's own process.


def _confine(kernel: Kernel, home: str, walls: bool, limits: dict[str, float]) -> None:
    os.setsid()
    os.chdir(home)
    memory, size = int(limits["memory_mb"]) << 20, int(limits["file_mb"]) << 20
    for name, soft in (
        ("AS", memory), ("CPU", int(limits["seconds"]) + 1), ("FSIZE", size), ("NOFILE", 64), ("CORE", 0), ("NPROC", 0),
    ):  # fmt: skip
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, soft))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    kernel.drop_capabilities()
    kernel.call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    kernel.call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not walls:
        for module in (os, sys.modules["posix"]):
            if hasattr(module, "pidfd_open"):
                del module.pidfd_open  # the one way to signal a process that raises no audit event
        sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple) -> None:
    """Audit hook of the level without walls: reading the standard library is all that is left of the system."""
    area = event.partition(".")[0]
    if event == "open":
        path, mode, flags = arguments
        reads = not (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        path = os.path.abspath(os.fsdecode(path)) if isinstance(path, (str, bytes)) else "/"
        if not (path.startswith(os.getcwd() + "/") or reads and path.startswith(sys.base_prefix + "/")):
            raise PermissionError(f"the sandbox refuses to open {path}")
    elif area in _REFUSED or area == "os" and event not in ("os.listdir", "os.scandir"):
        raise PermissionError(f"the sandbox refuses {event}")


_REFUSED = frozenset(
    "ctypes fcntl ftplib glob http imaplib mmap msvcrt nntplib pathlib poplib pty resource setopencodehook shutil signal "
    "smtplib socket sqlite3 subprocess syslog telnetlib tempfile urllib webbrowser winreg".split()
)


def _tell(key: str, text: str) -> None:
    os.write(RESULTS, json.dumps([key, text[:10000]]).encode() + b"\n")


def _reason(error: BaseException) -> str:
    return traceback.format_exception_only(type(error), error)[-1].strip()[:500]


def _execute(source: str, calls: list[str]) -> None:
    """Runs the program; tells what each call gave and that it came to its end. Never returns."""
    try:
        _tell("confined", "")
        scope: dict[str, object] = {"__name__": "__main__"}
        exec(compile(source, "<program>", "exec", dont_inherit=True), scope)
        for call in calls:
            try:
                _tell("value", repr(eval(call, scope)))
            except BaseException as error:
                _tell("raised", _reason(error))
        sys.stdout.flush()
        _tell("end", "")
    except BaseException as error:
        _tell("end", _reason(error))
    finally:
        os._exit(0)


if __name__ == "__main__":
    warden(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
