"""The warden of `sandbox.py`: runs in a process of its own, started from this text, with the standard library alone.

    python -P -s -S -c <this file> LEVEL FOLDER LIMITS     tasks on stdin, outcomes on stdout, one JSON line each

A task is [kind, a, b]: ["python", source, calls], ["sql", query, set-up scripts] or ["command", files, steps]. LIMITS
are those of `sandbox.py` and, for commands, "processes" and "roots" (folders to show besides the system's libraries).
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
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, MNT_DETACH = 1, 4, 38, 2
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
RESULTS = 3  # the descriptor on which a program's child tells its results
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}  # of commands


def visible(roots: list[str]) -> list[str]:
    """What a program may read: the interpreter, the system's shared libraries, and `roots`."""
    found = [sys.base_prefix, "/usr/lib", "/usr/lib64", "/lib", "/lib64", *roots]
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


def warden(level: str, folder: str, limits: dict) -> None:
    """Reads tasks from stdin, answers each with one outcome line on stdout, in order."""
    tasks, answers, null = os.fdopen(os.dup(0), encoding="utf-8"), os.dup(1), os.open("/dev/null", os.O_RDWR)
    os.environ.clear()  # what bwrap or Python's start has put there
    kernel = Kernel()
    kernel.call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for name in PRELOADED.split():
        __import__(name)
    walls = Walls(kernel, level, folder, limits)
    compile("0", "", "eval")  # its first call in a process builds the types of the syntax tree: 2 ms
    gc.freeze()  # a collection in a child would touch, and so copy, all of the warden's objects
    for line in tasks:
        task = json.loads(line)
        if task[0] != "python":  # before the fork: behind the walls these modules can't be found in every level
            __import__("sqlite3" if task[0] == "sql" else "subprocess")
        outcome = _supervise(kernel, walls, null, task, limits)
        os.write(answers, json.dumps(outcome).encode() + b"\n")
        walls.clean()


class Walls:
    """The walls of a level, with this process behind them.

    home: the programs' working directory. pid_namespace: this one's descriptor, -1 without. processes: a descriptor of
    /proc as this pid namespace sees it, -1 where it can't be had.
    """

    def __init__(self, kernel: Kernel, level: str, folder: str, limits: dict):
        self.kernel, self.home, self.pid_namespace, self.processes = kernel, "/tmp", -1, -1
        self.uid, self.size = NOBODY, 16
        if "processes" in limits:  # the limit on processes counts a user's, so that each warden needs a user of its own
            self.uid, self.size = 40000 + os.getpid() % 20000, int(limits["memory_mb"])
        if level == "rlimits":
            self.home = os.path.join(folder, "home")
            os.mkdir(self.home)
            os.chmod(self.home, 0o777)
        elif level == "namespaces":
            self._enter_namespaces(folder, limits.get("roots", []))
            self.pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)
            os.chroot(folder)
        elif level == "bubblewrap" and os.geteuid() != 0 and os.getpid() < 10:  # in bwrap's own pid namespace, or nowhere
            self.pid_namespace, self.processes = os.open("/proc/self/ns/pid", os.O_RDONLY), os.open("/proc", os.O_RDONLY)
            kernel.call("umount2", "/proc", MNT_DETACH)
            if self.size != 16:
                self.clean()
        else:
            raise RuntimeError(f"level {level!r} can't be built by uid {os.geteuid()} as process {os.getpid()}")

    def _enter_namespaces(self, folder: str, roots: list[str]) -> None:
        """Own namespaces and, under `folder`, the root that the programs will see. Goes on as pid 1 of a pid namespace."""
        kernel, uid, gid = self.kernel, os.geteuid(), os.getegid()
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
        for path in visible(roots):
            os.makedirs(folder + path)
            kernel.mount(path, folder + path, None, MS_BIND | MS_REC)
        os.mkdir(folder + "/tmp")
        os.mkdir(folder + "/dev")
        for path in DEVICES:
            open(folder + path, "w").close()
        kernel.read_only(folder)
        for path in DEVICES:
            kernel.mount(path, folder + path, None, MS_BIND)
        kernel.mount("tmpfs", folder + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={self.size}m,mode=1777")
        child = os.fork()
        if child:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
        kernel.call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        try:
            kernel.mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV)
            self.processes = os.open("/proc", os.O_RDONLY)
        except OSError:  # a container that hides parts of its own /proc
            pass

    def clean(self) -> None:
        """An empty working directory for the next program, whatever the last one left there."""
        if self.pid_namespace >= 0:
            if os.listdir(self.home) or self.size != 16:
                self.kernel.call("umount2", self.home, MNT_DETACH)
                self.kernel.mount("tmpfs", self.home, "tmpfs", MS_NOSUID | MS_NODEV, f"size={self.size}m,mode=1777")
        else:
            for name in os.listdir(self.home):
                path = os.path.join(self.home, name)
                shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)

    def resident(self) -> int:
        """MB in the memory of all processes behind the walls but this one; 0 where /proc can't be read."""
        pages = 0
        for name in os.listdir(self.processes) if self.processes >= 0 else []:
            if name.isdigit() and name != str(os.getpid()):
                try:
                    descriptor = os.open(f"{name}/statm", os.O_RDONLY, dir_fd=self.processes)
                except OSError:  # it has ended
                    continue
                try:
                    pages += int(os.read(descriptor, 100).split()[1])
                except (OSError, IndexError):
                    pass
                os.close(descriptor)
        return pages * resource.getpagesize() >> 20


def _supervise(kernel: Kernel, walls: Walls, null: int, task: list, limits: dict) -> dict[str, object]:
    """One program in a child of its own; kills it, and all it started, when it has answered or its time is over."""
    pipes = [os.pipe() for _ in range(3)]  # what it prints, what it tells, and one that closes when it ends
    (output, output_end), (results, results_end), (alive, alive_end) = pipes
    os.set_blocking(output_end, False)  # a full pipe is the limit of output: the write fails, nobody waits
    os.set_blocking(results_end, False)
    if walls.pid_namespace >= 0:
        kernel.call("unshare", CLONE_NEWPID)  # the next fork is pid 1 of a new namespace: when it dies, all there die
    child = os.fork()
    if child == 0:
        for place, descriptor in enumerate((null, output_end, output_end, results_end, alive_end)):
            os.dup2(descriptor, place)
        os.closerange(RESULTS + 2, 256)
        try:
            _confine(kernel, walls, task[0], limits)
        except BaseException as error:
            _tell("failed", _reason(error))
            os._exit(1)
        _end(RUN[task[0]], *task[1:], limits)
    for _, end in pipes:
        os.close(end)
    if walls.pid_namespace >= 0:
        kernel.call("setns", walls.pid_namespace, CLONE_NEWPID)
    late = _wait(child, alive, limits, walls if task[0] == "command" else None)
    try:
        os.killpg(child, signal.SIGKILL)
    except OSError:  # gone already, or killed before it had a group
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    told, printed = (_drain(descriptor) for descriptor in (results, output))
    os.close(alive)
    return _outcome(told, printed, late or status == signal.SIGXCPU, 0 if task[0] == "command" else len(task[2]))


def _wait(child: int, alive: int, limits: dict, walls: Walls | None) -> bool:
    """Until the program ends (False) or a limit of time does (True). CPU time decides, so that a busy machine changes no
    verdict; the wall is for those who sleep. With `walls`, the memory of all processes there ends it too (False)."""
    clock = (~child << 3) | 2  # Linux's CPU clock of another process, as clock_getcpuclockid(3) makes it
    start, patience = time.monotonic(), 0.05
    while not select.select([alive], [], [], patience)[0]:
        if time.clock_gettime(clock) > limits["seconds"] or time.monotonic() - start > limits["wall_seconds"]:
            return True
        if walls and walls.resident() > limits["memory_mb"]:
            return False
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


def _confine(kernel: Kernel, walls: Walls, kind: str, limits: dict) -> None:
    os.setsid()
    os.chdir(walls.home)
    command, memory, size = kind == "command", int(limits["memory_mb"]) << 20, int(limits["file_mb"]) << 20
    if command and walls.pid_namespace < 0:
        raise RuntimeError("commands need namespaces or bubblewrap")
    for name, soft in (
        # Runtimes reserve address space by the hundred gigabytes: for commands, what they can write to counts.
        ("DATA" if command else "AS", memory), ("CPU", int(limits["seconds"]) + 1), ("FSIZE", size), ("CORE", 0),
        ("NOFILE", 256 if command else 64), ("NPROC", int(limits.get("processes", 0))),
    ):  # fmt: skip
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, soft))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(walls.uid, walls.uid, walls.uid)
        os.setresuid(walls.uid, walls.uid, walls.uid)
    kernel.drop_capabilities()
    kernel.call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    kernel.call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # a command of the same user must not trace this process
    kernel.call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if walls.pid_namespace < 0 and kind == "python":  # SQL runs in our own code, with an authorizer
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


def _end(run: object, *task: object) -> None:
    """Runs the task; tells that it came to its end, or why not. Never returns."""
    try:
        _tell("confined", "")
        signal.signal(signal.SIGPROF, _too_long)
        run(*task)
        sys.stdout.flush()
        _tell("end", "")
    except BaseException as error:
        _tell("end", _reason(error))
    finally:
        os._exit(0)


def _python(source: str, calls: list[str], limits: dict) -> None:
    """Executes the program and tells what each call gave; a call that takes more than its own CPU time raises."""
    scope: dict[str, object] = {"__name__": "__main__"}
    exec(compile(source, "<program>", "exec", dont_inherit=True), scope)
    for call in calls:
        _call(lambda call=call: repr(eval(call, scope)), limits)


def _call(value: object, limits: dict) -> None:
    try:
        signal.setitimer(signal.ITIMER_PROF, limits["call_seconds"])
        _tell("value", value())
    except BaseException as error:
        _tell("raised", _reason(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _too_long(*_: object) -> None:
    raise TimeoutError("a call took too long")


def _sql(query: str, setups: list[str], limits: dict) -> None:
    """What the query gives on each database: `repr` of its rows, at most 1000. It may only read."""
    import sqlite3

    allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
    refuse = lambda action, first, second, *_: sqlite3.SQLITE_DENY if action not in allowed or second == "load_extension" else 0  # noqa: E731
    for setup in setups:
        database = sqlite3.connect(":memory:")
        database.executescript(setup)
        database.set_authorizer(refuse)
        start = time.process_time()
        database.set_progress_handler(lambda start=start: time.process_time() - start > limits["call_seconds"], 10000)
        _call(lambda database=database: repr(database.execute(query).fetchmany(1000)), limits)


def _command(files: dict[str, str], steps: list[list[str]], limits: dict) -> None:
    """Writes the files, runs the steps until one fails, and leaves the last one's output on the descriptor of output."""
    import subprocess

    for name, text in files.items():
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)
    for step in steps:
        with open(".out", "wb") as out, open(".err", "wb") as err:  # files: their size has a limit, and nobody waits
            done = subprocess.run(step, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=ENVIRONMENT)
        with open(".out", "rb") as out, open(".err", "rb") as err:
            printed, said = out.read(32768), err.read(400).decode(errors="replace")
        if done.returncode:
            os.write(1, printed)
            raise RuntimeError(f"{os.path.basename(step[0])} ended with status {done.returncode}: {said}")
    os.write(1, printed)


RUN = {"python": _python, "sql": _sql, "command": _command}


if __name__ == "__main__":
    warden(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
