"""Artifacts of a bucket on this machine's disk: whole folders, the longest unused go first, one in use never."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path

GB = 1_000_000_000


class Cache:
    """`folder/<fingerprint>/` for each artifact, beside a lock file whose modification time is its last use. Processes
    that share the folder hold what they read with shared locks, which end with them, however they end.

    limit: bytes above which `trim` removes; 0: never.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._locks = folder / ".locks"
        self._held: dict[str, tuple[int, int]] = {}  # fingerprint -> (open lock file, times held)
        self._mutex = threading.Lock()

    def hold(self, fingerprint: str) -> Path:
        """Keep the artifact's folder from being removed until `release`, or the end of this process."""
        with self._mutex:
            file, times = self._held.get(fingerprint, (-1, 0))
            if not times:
                self._locks.mkdir(parents=True, exist_ok=True)  # a plan holds nothing, and may not be able to
                file = os.open(self._locks / fingerprint, os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(file)
            self._held[fingerprint] = (file, times + 1)
        return self.folder / fingerprint

    def release(self, fingerprint: str) -> None:
        with self._mutex:
            file, times = self._held.pop(fingerprint, (-1, 0))
            if times > 1:
                self._held[fingerprint] = (file, times - 1)
            elif times:
                os.close(file)

    def trim(self) -> None:
        """Remove the longest unused artifacts that nobody holds, until the limit is kept."""
        if not self.limit:
            return
        sizes = {path.name: _size(path) for path in self.folder.iterdir() if path.name != ".locks"}
        excess = sum(sizes.values()) - self.limit
        for name in sorted(sizes, key=self._last_use):
            if excess <= 0:
                return
            if self._remove(name):
                excess -= sizes[name]

    def _last_use(self, fingerprint: str) -> float:
        lock = self._locks / fingerprint
        return lock.stat().st_mtime if lock.exists() else 0.0

    def _remove(self, fingerprint: str) -> bool:
        file = os.open(self._locks / fingerprint, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            shutil.rmtree(self.folder / fingerprint, ignore_errors=True)  # another process may have been first
            return True
        finally:
            os.close(file)


def _size(folder: Path) -> int:
    """Bytes of its files, but for those that others move or remove meanwhile."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(root, name)).st_size
    return total
