"""A warm worker: imports the slow libraries once, then forks one process a stage.

Reads jobs as JSON lines from standard input, {"job", "spec", "log", "threads"}, and answers on standard output, {"ready":
true}, {"job", "pid"} and {"job", "status"} (negative: the signal that ended it). A fork is a clean process: no state of one
stage can reach the next, and it can be killed alone. The end of standard input means that the parent is gone: everything
below ends.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import sys
import traceback
import warnings

from stages.model import cuda
from stages.run import PR_SET_PDEATHSIG, main, passive_threads

PRELOAD = ("torch", "megatron.core.models.gpt", "megatron.core.optimizer", "megatron.core.dist_checkpointing",
           "transformers.models.cohere2.modeling_cohere2", "pyarrow.parquet", "tokenizers")  # fmt: skip
GRACE_SECONDS = 5.0
PR_SET_CHILD_SUBREAPER = 36


def preload(device: str) -> bool:
    """Import the slow libraries; whether forks of this process can do what a fresh one can: none has a GPU once CUDA has been
    started, and what an import fails at is told by the stage that needs it."""
    passive_threads()
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")  # of pyarrow's allocator, else from its import on
    given = os.environ.get("CUDNN_HOME")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for a GPU, as Transformer Engine's import does, starts none
        cuda.prepare()
        # The driver's own thread, idle before CUDA is started; there is no other (tests/gpu/test_worker.py).
        warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
    with warnings.catch_warnings(action="ignore"):  # Megatron-core advises to install Apex; what is used instead is meant
        try:
            for name in PRELOAD:
                importlib.import_module(name)
            forkable = device == "cpu" or not cuda.started()
        except Exception:
            traceback.print_exc()
            forkable = False
    gc.freeze()
    if not forkable and given is None:
        os.environ.pop("CUDNN_HOME", None)  # else a fresh process would take it for the user's
    return forkable


def serve(device: str) -> None:
    """Serve jobs on `device` until standard input ends. Single-threaded: forking is only safe without threads."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # grandchildren of a dead stage come to us, to be ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, lambda *_: _end())
    forkable = preload(device)
    wake, alarm = os.pipe()
    os.set_blocking(alarm, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    jobs: dict[int, str] = {}  # pid -> job
    answers.write('{"ready": true}\n')
    pending = b""
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            _reap(jobs, answers)
        if 0 in ready:
            chunk = os.read(0, 65536)
            if not chunk:
                return _end()
            *lines, pending = (pending + chunk).split(b"\n")
            for request in map(json.loads, lines):
                pid = _fork(request, libc, answers, forkable)
                jobs[pid] = request["job"]
                answers.write(json.dumps({"job": request["job"], "pid": pid}) + "\n")


def _fork(request: dict, libc: ctypes.CDLL, answers, forkable: bool) -> int:
    # Blocked until the child has left this process's handlers behind: a SIGTERM in between would run ours in it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return pid
    status = 1
    try:
        os.setsid()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # kill -9 of the worker must not leave a stage that writes on
        os.close(answers.fileno())  # nor keep its parent waiting for answers
        signal.set_wakeup_fd(-1)
        for name in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ["OMP_NUM_THREADS"] = str(request["threads"])
        if not forkable:
            os.execv(sys.executable, [sys.executable, "-m", "stages.run", request["spec"]])
        status = main(request["spec"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _reap(jobs: dict[int, str], answers) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in jobs:
            answers.write(json.dumps({"job": jobs.pop(pid), "status": os.waitstatus_to_exitcode(status)}) + "\n")


def end_tree(pid: int, grace: float = GRACE_SECONDS) -> None:
    """End a process and all its descendants: SIGTERM, then SIGKILL after `grace` seconds. Ranks that a launcher put
    into sessions of their own are found through the process tree, not the group."""
    import psutil

    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for stop, wait in ((psutil.Process.terminate, grace), (psutil.Process.kill, 1.0)):
        for process in tree:
            try:
                stop(process)
            except psutil.NoSuchProcess:
                pass
        _, tree = psutil.wait_procs(tree, timeout=wait)


def _end() -> None:
    import psutil

    for child in psutil.Process().children():
        end_tree(child.pid, grace=1.0)
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1] if len(sys.argv) > 1 else "cpu")
