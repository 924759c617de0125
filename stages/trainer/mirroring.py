"""Committed checkpoints on their way to another place (stages/store/mirror.py) while training goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from stages.stage import CuveeError


class Mirroring:
    """Every rank sends the files that it wrote in a thread; when all have, the first one seals the checkpoint. While one is
    on its way the newest of those that come waits. A store that can't be reached costs a line in the log.

    mirror: a stages.store.mirror.Mirror, on all ranks or on none. Every method is a collective; `busy` and `sending` ask
    this rank alone.
    """

    def __init__(self, mirror: Any):
        self.mirror = mirror
        self.sending: Path | None = None
        self._next: tuple[Path, list[str]] | None = None
        self._work: Future | None = None  # of this rank
        self._thread = ThreadPoolExecutor(1, "mirror")

    @property
    def busy(self) -> bool:
        return self._work is not None and not self._work.done()

    def add(self, checkpoint: Path, names: list[str]) -> None:
        """names: this rank's files of a committed checkpoint."""
        if self.mirror is not None:
            self._next = (checkpoint, names)

    def go_on(self) -> None:
        """Seal what all have sent, or begin with what waits. To be called while no rank is busy."""
        if self.sending is not None:
            tables: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(tables, self._work.result())
            step, self.sending, self._work = self.sending.name, None, None
            if dist.get_rank() == 0 and None not in tables:
                self._work = self._thread.submit(self._seal, step, {k: v for one in tables for k, v in one.items()})
        elif self._next is not None:
            (self.sending, names), self._next = self._next, None
            self._work = self._thread.submit(self._send, self.sending, names)

    def finish(self) -> None:
        """Return when the newest checkpoint that was added is sealed, or could not be sent."""
        while True:
            if self._work is not None:
                self._work.result()
            dist.barrier()  # now no rank is busy
            if self.sending is None and self._next is None:
                return
            self.go_on()

    def _send(self, checkpoint: Path, names: list[str]) -> dict[str, list[str]] | None:
        try:
            return self.mirror.send(checkpoint, names)
        except (CuveeError, OSError) as error:
            print(f"the checkpoint of step {int(checkpoint.name)} stays on this host: {error}", flush=True)
        return None

    def _seal(self, step: str, table: dict[str, list[str]]) -> None:
        try:
            self.mirror.seal(step, table)
        except CuveeError as error:
            print(f"the checkpoint of step {int(step)} stays on this host: {error}", flush=True)
