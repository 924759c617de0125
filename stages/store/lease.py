"""A lease keeps two runs from making one artifact. Its holder beats; a holder that stopped beating has lost it.

No clock is compared with another: who waits watches the holder's heartbeat and measures with its own monotonic clock how
long it has not changed. Time in which it could not look (an outage, a suspended machine) is no silence of the holder's.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from stages.stage import CuveeError
from stages.store._bucket import Bucket

BEAT_SECONDS = 5.0
EXPIRY_SECONDS = 60.0
logger = logging.getLogger("cuvee.store")


@cache
def here() -> str:
    """This host as processes are counted in it: two containers of one machine are two, and so are namesakes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def born(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since boot: unlike a time of day it does not change when the
    clock is set. None where there is no such process, or only what its parent has not yet buried."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(numbers[18])


def this_process() -> dict[str, Any]:
    """What `is_gone` judges a process by."""
    return {"host": here(), "pid": os.getpid(), "born": born(os.getpid())}


def is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this host that has ended."""
    return holder.get("host") == here() and born(holder["pid"]) != holder["born"]


class Lease:
    """Exclusive right to make one artifact; a context manager. A kind of lease says where the right is kept.

    `acquire` waits for a living holder and takes over from a dead one: at once when the holder was a process of this
    host that is gone, otherwise when its heartbeat has not changed for `expiry` seconds.
    """

    POLL_SECONDS = 0.5

    def __init__(self, expiry: float = EXPIRY_SECONDS):
        self.expiry, self.token = expiry, uuid.uuid4().hex
        self._stop = threading.Event()
        self._seen: tuple[Any, float, float] = (None, 0.0, 0.0)  # heartbeat, when it was last looked at, seconds unchanged
        self._beater: threading.Thread | None = None

    def __enter__(self) -> Lease:
        if self._beater is None:
            self.wait(threading.Event())
        return self

    def wait(self, cancelled: threading.Event) -> bool:
        """Until this lease is held; False where `cancelled` is set before."""
        while not self.acquire():
            if cancelled.wait(self.POLL_SECONDS):
                return False
        return True

    def __exit__(self, error: object, *_: object) -> None:
        self.release(done=error is None)

    def acquire(self) -> bool:
        """True when this lease is now held; False while somebody else lives."""
        if not self._take():
            return False
        self._beater = threading.Thread(target=self._beat, daemon=True)
        self._beater.start()
        return True

    def release(self, done: bool = False) -> None:
        """Give the right up. done: the artifact is published, so that nobody needs the right again."""
        self._stop.set()
        if self._beater is not None:
            self._beater.join()
        self._give_back(done)

    def _unchanged(self, heartbeat: Any) -> float:
        """Seconds for which this process has seen the heartbeat unchanged. Between two looks at most BEAT_SECONDS count."""
        now, (before, looked, silent) = time.monotonic(), self._seen
        silent = silent + min(now - looked, BEAT_SECONDS) if heartbeat == before else 0.0
        self._seen = (heartbeat, now, silent)
        return silent

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                if not self._still_mine():
                    logger.warning("the lease was taken over while this process was silent; the first to publish wins")
                    return
            except (OSError, CuveeError) as error:
                logger.warning("no heartbeat reached the store: %s", error)

    def _me(self) -> dict[str, Any]:
        return this_process() | {"token": self.token}


class FileLease(Lease):
    """As a file whose modification time is the heartbeat."""

    def __init__(self, path: Path, expiry: float = EXPIRY_SECONDS):
        super().__init__(expiry)
        self.path = path

    def _take(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine = self.path.with_name(f"{self.path.name}.{self.token}")
        mine.write_text(json.dumps(self._me()))
        try:
            os.link(mine, self.path)  # atomic: fails when the lease exists, and the file appears with its text
            return True
        except FileExistsError:
            self._evict_dead()
            return False
        finally:
            mine.unlink()

    def _give_back(self, done: bool) -> None:
        if self._holds():
            self.path.unlink(missing_ok=True)

    def _holds(self) -> bool:
        with suppress(FileNotFoundError):
            return _holder(self.path).get("token") == self.token
        return False

    def _evict_dead(self) -> None:
        with suppress(FileNotFoundError):
            holder, beat = _holder(self.path), self.path.stat().st_mtime_ns
            if not (self._unchanged((holder, beat)) > self.expiry or is_gone(holder)):
                return
            grave = self.path.with_name(f"{self.path.name}.dead.{self.token}")
            os.rename(self.path, grave)  # atomic: of two rivals one moves it away
            if _holder(grave) != holder:  # a rival evicted first and already holds it: give it back
                with suppress(FileExistsError):  # unless a third took it meanwhile: the second then sees that it lost it
                    os.link(grave, self.path)
            grave.unlink()

    def _still_mine(self) -> bool:
        if not self._holds():
            return False
        with suppress(FileNotFoundError):
            os.utime(self.path)
        return True


def _holder(path: Path) -> dict[str, Any]:
    """Whom a lease's file names; nobody, who will never beat, where a power failure left it without its text."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return {}


class ObjectLease(Lease):
    """As an object of a bucket. Every heartbeat changes its ETag, and whoever writes it names the ETag it knows, so that
    of two that take over from a dead holder one wins. Given up, it stays as an object without a holder: not every
    service deletes under a condition."""

    POLL_SECONDS = 1.0

    def __init__(self, bucket: Bucket, name: str, expiry: float = EXPIRY_SECONDS):
        super().__init__(expiry)
        self.bucket, self.name = bucket, name
        self._etag, self._beats = "", 0

    def _take(self) -> bool:
        found = self.bucket.get(self.name)
        if found is None:
            return self._write(absent=True)
        holder = json.loads(found[0])
        free = not holder["token"] or self._unchanged(found[1]) > self.expiry or is_gone(holder)
        return free and self._write(replaces=found[1])

    def _write(self, patience: float | None = None, token: str | None = None, **condition: Any) -> bool:
        self._beats += 1
        holder = self._me() | {"beat": self._beats} | ({} if token is None else {"token": token})
        self._etag = self.bucket.put(self.name, json.dumps(holder).encode(), patience=patience, **condition)
        if self._etag:
            return True
        found = self.bucket.get(self.name, patience)  # a retry of our own success looks like a rival's
        if found and (held := json.loads(found[0])) and held == holder:
            self._etag = found[1]
            return True
        return False

    def _give_back(self, done: bool) -> None:
        try:
            if self._etag and self._write(BEAT_SECONDS, token="", replaces=self._etag) and done:
                self.bucket.delete(self.name)  # whoever takes it in between finds the artifact published
        except CuveeError as error:
            logger.warning("the lease expires by itself in %.0f s: %s", self.expiry, error)

    def _still_mine(self) -> bool:
        known = self._etag
        try:
            if self._write(BEAT_SECONDS, replaces=known):
                return True
            found = self.bucket.get(self.name, BEAT_SECONDS)
            if found and json.loads(found[0])["token"] == self.token:  # an earlier heartbeat whose answer was lost
                self._etag = found[1]
                return True
            return False
        except CuveeError:
            self._etag = self._etag or known
            raise
