"""Untrusted programs, many in one subprocess round: a warden process forks one child a program.

    outcomes = run([Program("def f(x):\n    return x + 3", ["f(1)", "f(-3)"])])     # outcomes[0].values == ["4", "0"]
    outcomes = run([Query("SELECT max(n) FROM t", ["CREATE TABLE t(n); INSERT INTO t VALUES (7)"])])     # "[(7,)]"
    outcomes = run_commands([Command({"main.js": "console.log(1 + 2)"}, [["node", "main.js"]])])     # output == "3\n"

Every program runs in a fresh child with limits on wall and CPU time, memory, files, output and processes (none, threads
neither), with an empty environment, an empty working directory, and no file descriptor but its own output. The child
evaluates the calls and sends back their `repr`; what was expected stays outside, so a program can't read or forge it.

What each level gives, strongest first (`best_level()` is the first that works here; CUVEE_SANDBOX in the environment
names the only one you accept):

- "namespaces": own user (when not root), mount, pid, network, IPC and UTS namespaces. The root is an empty tmpfs with
  the interpreter and system libraries mounted read-only: no other file, process or network exists for the program. As
  root the program runs as uid 65534, otherwise as the calling user; without capabilities in either case.
- "bubblewrap": the same walls built by `bwrap`, for users of hosts where only it may create namespaces.
- "rlimits": no walls, for machines that give no namespaces (many containers, Ubuntu 24.04 for ordinary users); each
  process that takes it says so in its log. Resource limits hold. As root the program runs as uid 65534 and can read what
  is world-readable; otherwise it has the caller's own rights. An audit hook inside the interpreter refuses files,
  sockets, processes and signals: enough for accidents, NOT against a program that breaks the interpreter.

Commands (other languages: compilers and runtimes need threads, processes, folders) run at the first two levels only, as
root as a uid of the warden's own, with limits on the processes (before Linux 5.14 these count all that the calling user
has) and on the memory of all of them together. SQL runs in SQLite's engine, on a database in memory, and may only read.

No level stops timing side channels, kernel exploits or (unless the caller is root) System V shared memory.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from stages._warden import DEVICES, visible
from stages.stage import CuveeError, unknown

LEVELS = ("namespaces", "bubblewrap", "rlimits")
# Seconds of CPU time of a program and of each of its calls; those of commands hold for each of their processes.
LIMITS = {"seconds": 1.0, "call_seconds": 0.5, "wall_seconds": 20.0, "memory_mb": 256, "file_mb": 1}
COMMAND_LIMITS = {"seconds": 10.0, "wall_seconds": 60.0, "memory_mb": 1024, "file_mb": 64, "processes": 64}
logger = logging.getLogger("cuvee.sandbox")
_WARDEN = Path(__file__).with_name("_warden.py")


@dataclass(frozen=True)
class Program:
    """`source` is executed, then each expression of `calls` evaluated in its namespace."""

    source: str
    calls: list[str] = field(default_factory=list)

    def task(self) -> list[Any]:
        return ["python", self.source, self.calls]


@dataclass(frozen=True)
class Query:
    """`query`, one SELECT of SQLite's dialect, is run on a fresh database for each script of `setups`."""

    query: str
    setups: list[str]

    def task(self) -> list[Any]:
        return ["sql", self.query, self.setups]


@dataclass(frozen=True)
class Command:
    """`files` (name -> text) are written to an empty folder; each of `steps` (a program and its arguments) runs there
    when the one before has ended well."""

    files: dict[str, str]
    steps: list[list[str]]

    def task(self) -> list[Any]:
        return ["command", self.files, self.steps]


@dataclass(frozen=True)
class Outcome:
    """status: "ok" (all calls were evaluated), "error" (the source raised), "timeout", "killed" (crash, memory).

    values: one entry a call, its `repr` (at most 10,000 characters), or None where it raised or was never reached; of
    a query, the `repr` of its rows on each database; none of commands.
    output: stdout and stderr together; a program that prints more than a pipe holds (64 KiB) gets an error. Of commands,
    the last step's stdout, at most 32 KiB. error: the first exception, one line.
    """

    status: str
    values: list[str | None]
    output: str
    error: str


def run(programs: Sequence[Program | Query], limits: dict[str, float] | None = None, level: str = "") -> list[Outcome]:
    """One outcome a program, in order. limits: overrides of LIMITS, each for one program. level: "" for the best here.

    Raises CuveeError when the sandbox itself fails; whatever a program does is an Outcome.
    """
    return _run(programs, {**LIMITS, **(limits or {})}, level) if programs else []


def run_commands(
    commands: list[Command], roots: Sequence[str] = (), limits: dict[str, float] | None = None, level: str = ""
) -> list[Outcome]:
    """One outcome a command, in order; several run at a time. roots: folders that they may read besides /usr, /bin and
    the system's libraries. limits: overrides of COMMAND_LIMITS.

    Raises CuveeError when the sandbox itself fails or this machine has neither namespaces nor bubblewrap for it.
    """
    level = level or best_level()
    if level == "rlimits":
        raise CuveeError("the sandbox runs other languages than Python and SQL behind namespaces only, not at the level rlimits; "
                         "allow unprivileged user namespaces, or install bubblewrap, or run elsewhere")  # fmt: skip
    found = {**COMMAND_LIMITS, **(limits or {}), "roots": [p for p in ("/usr", "/bin", *roots) if os.path.isdir(p)]}
    workers = min(len(commands), len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        parts = list(pool.map(lambda k: _run(commands[k::workers], found, level), range(workers)))
    return [parts[i % workers][i // workers] for i in range(len(commands))]


def _run(programs: Sequence[Any], limits: dict[str, Any], level: str) -> list[Outcome]:
    level = level or best_level()
    if level not in LEVELS:
        raise CuveeError(f"sandbox level: {unknown(level, list(LEVELS))}")
    lines = [json.dumps(p.task()) + "\n" for p in programs]
    tasks = list(dict.fromkeys(lines))  # sampled programs repeat: one run each
    with tempfile.TemporaryDirectory(prefix="cuvee-sandbox-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o711)
        answer, reason = _round(level, folder, limits, "".join(tasks), 20 + len(tasks) * (limits["wall_seconds"] + 1))
    answers = answer.decode().splitlines()
    if len(answers) != len(tasks):
        raise CuveeError(
            f"the sandbox (level {level}) ended after {len(answers)} of {len(tasks)} programs: {reason or 'no message'}; "
            f"see stages/sandbox.py for what the level needs"
        )
    outcome = {task: Outcome(**json.loads(line)) for task, line in zip(tasks, answers, strict=True)}
    return [outcome[line] for line in lines]


def _round(level: str, folder: str, limits: dict[str, Any], tasks: str, patience: float) -> tuple[bytes, str]:
    """The warden's answer to all tasks and, where it failed, the last line it said."""
    # The base interpreter, isolated: no site-packages, no paths of the user or of this folder; its program as text, since
    # the walls leave it no way back. Not "-I", which would ignore the hash seed: sets must print alike in every run.
    python = [os.path.realpath(sys.executable), "-P", "-s", "-S", "-B", "-c", _WARDEN.read_text("utf-8")]
    command = [*_bubblewrap(level, limits.get("roots", [])), *python, level, folder, json.dumps(limits)]
    with tempfile.TemporaryFile() as log:
        warden = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env={"PYTHONHASHSEED": "0"}, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        try:
            answer = warden.communicate(tasks.encode(), patience)[0]
        except subprocess.TimeoutExpired:
            answer = b""
        finally:
            if warden.poll() is None:
                os.killpg(warden.pid, signal.SIGKILL)
            warden.wait()
        log.seek(0)
        return answer, log.read().decode(errors="replace").strip().rpartition("\n")[2]


def _bubblewrap(level: str, roots: list[str]) -> list[str]:
    if level != "bubblewrap":
        return []
    binds = [part for path in visible(roots) for part in ("--ro-bind", path, path)]
    binds += [part for path in DEVICES for part in ("--dev-bind", path, path)]  # --dev would cost the warden its rights
    return [
        "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-add", "CAP_SYS_ADMIN", *binds,
        "--proc", "/proc", "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--",
    ]  # fmt: skip


@lru_cache(maxsize=1)
def best_level() -> str:
    """The strongest level that runs a trivial program here, or the one that CUVEE_SANDBOX names; found once a process.

    Raises CuveeError where none does.
    """
    own, reasons = os.environ.get("CUVEE_SANDBOX", ""), []
    if own and own not in LEVELS:
        raise CuveeError(f"CUVEE_SANDBOX: {unknown(own, list(LEVELS))}")
    for level in [own] if own else LEVELS:
        if level == "bubblewrap" and (os.geteuid() == 0 or not shutil.which("bwrap")):
            continue  # root inside bwrap's user namespace would escape the limit on processes
        try:
            if run([Program("x = 1", ["x + 1"])], {"wall_seconds": 60.0}, level)[0].values == ["2"]:
                if level == "rlimits" and not own:
                    logger.warning("model-written programs run under limits of resources alone, this machine gives no namespaces: "
                                   "see stages/sandbox.py; CUVEE_SANDBOX=namespaces refuses that, CUVEE_SANDBOX=rlimits is silent")
                return level
        except CuveeError as error:
            reasons.append(str(error))
    raise CuveeError(f"the sandbox of model-written programs does not run on this machine at {own and f'CUVEE_SANDBOX={own}' or 'any level'} "
                     f"({'; '.join(reasons) or 'it is not installed'}); allow (unprivileged) user namespaces, install bubblewrap for an "
                     "ordinary user, run elsewhere, or set CUVEE_SANDBOX=rlimits to have limits of resources alone")  # fmt: skip
