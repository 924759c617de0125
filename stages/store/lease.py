"""A lease keeps two runs from making one artifact. Its holder beats; a holder that stopped beating has lost it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

import psutil

BEAT_SECONDS = 5.0
EXPIRY_SECONDS = 60.0


class Lease:
    """Exclusive right to make one artifact, as a file whose modification time is the heartbeat.

    Use as a context manager. `acquire` waits for a living holder and takes over from a dead one: at once when the
    holder was a process of this host that is gone, otherwise EXPIRY_SECONDS after its last beat.
    """

    def __init__(self, path: Path, expiry: float = EXPIRY_SECONDS):
        self.path, self.expiry = path, expiry
        self.token = uuid.uuid4().hex
        self._stop = threading.Event()

    def __enter__(self) -> Lease:
        while not self.acquire():
            time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> bool:
        """True when this lease is now held; False while somebody else lives."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine = self.path.with_name(f"{self.path.name}.{self.token}")
        mine.write_text(json.dumps({"token": self.token, "host": socket.gethostname(), "pid": os.getpid(),
                                    "born": psutil.Process().create_time()}))
        try:
            os.link(mine, self.path)  # atomic: fails when the lease exists, and the file appears with its text
        except FileExistsError:
            self._evict_dead()
            return False
        finally:
            mine.unlink()
        threading.Thread(target=self._beat, daemon=True).start()
        return True

    def release(self) -> None:
        self._stop.set()
        if self._holder().get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def _holder(self) -> dict:
        try:
            return json.loads(self.path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def _evict_dead(self) -> None:
        holder = self._holder()
        if not holder or not self._dead(holder):
            return
        grave = self.path.with_name(f"{self.path.name}.dead.{self.token}")
        try:
            os.rename(self.path, grave)  # atomic: of two rivals one moves it away
        except FileNotFoundError:
            return
        if json.loads(grave.read_text()) != holder:  # a rival evicted first and already holds it: give it back
            with suppress(FileExistsError):  # unless a third took it meanwhile: the second then sees that it lost it
                os.link(grave, self.path)
        grave.unlink()

    def _dead(self, holder: dict) -> bool:
        if holder["host"] == socket.gethostname():
            try:
                return psutil.Process(holder["pid"]).create_time() != holder["born"]
            except psutil.NoSuchProcess:
                return True
        return time.time() - self.path.stat().st_mtime > self.expiry

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            if self._holder().get("token") != self.token:
                return
            os.utime(self.path)
