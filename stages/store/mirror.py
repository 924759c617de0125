"""A running stage's checkpoints in the bucket, so that another host can go on from them.

`<uri>/scratch/<fingerprint>/<step>.json` names a checkpoint's files and their chunks and is written last; the chunks are
objects named by their SHA-256, so that a push that was cut off, or repeated by another host, sends only what is not
there. Pushing goes on beside the training; a bucket that can't be reached costs a warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.stage import CuveeError
from stages.store import record as records
from stages.store._bucket import TRANSFERS, Bucket

CHUNK_BYTES = 32 * 1024 * 1024
PATIENCE_SECONDS = 60.0  # with a bucket that can't be reached: there will be a newer checkpoint
KEPT = 2  # checkpoints in the bucket
INDEX = ".metadata"  # torch's index of a checkpoint, which it reads with pickle
INDEX_NAMES = re.compile(r"torch\.distributed\.checkpoint\.\w+\.\w+|torch\.serialization\._get_layout|torch\.Size|"
                         r"torch\.(bool|b?float|u?int|complex)[0-9]*\w*")
COMMIT = "commit.json"  # what makes a folder a checkpoint, see stages/trainer/checkpoint.py
METRICS = "metrics.jsonl"  # of the stage so far, beside its checkpoints


class Mirror:
    """The checkpoints of one stage, `<scratch>/checkpoints/<step>/`, kept in a bucket by one process at a time."""

    def __init__(self, uri: str, endpoint: str, fingerprint: str, bucket: Bucket | None = None):
        self._open = (lambda: bucket) if bucket else (lambda: _impatient(Bucket(uri, endpoint)))
        self.base = f"scratch/{fingerprint}/"
        self._thread = ThreadPoolExecutor(1, "mirror")
        self._pushing: Future | None = None
        self._newest: Path | None = None

    @cached_property
    def bucket(self) -> Bucket:
        return self._open()

    def push(self, checkpoint: Path, log: Callable[[str], None] = print) -> None:
        """Send a committed checkpoint in the background. While one is being sent, the newest of those that come waits."""
        self._newest = checkpoint
        if self._pushing is None or self._pushing.done():
            self._pushing = self._thread.submit(self._push_newest, log)

    def wait(self) -> None:
        """Until the newest checkpoint that was pushed is in the bucket, or could not be sent."""
        if self._pushing is not None:
            self._pushing.result()

    def _push_newest(self, log: Callable[[str], None]) -> None:
        while (checkpoint := self._newest) is not None:
            self._newest = None
            try:
                push_checkpoint(self.bucket, self.base, checkpoint)
            except CuveeError as error:
                log(f"the checkpoint of step {int(checkpoint.name)} stays on this host: {error}")
            except FileNotFoundError:
                pass  # a newer one replaced it on disk before it was sent

    def pull(self, scratch: Path, log: Callable[[str], None] = print) -> Path | None:
        """Bring the newest whole checkpoint of the bucket to `scratch`, unless one as new is there; returns its folder."""
        here = sorted(mark.parent.name for mark in (scratch / "checkpoints").glob(f"*/{COMMIT}"))
        for name in sorted(_manifests(self.bucket, self.base), reverse=True):
            if here and here[-1] >= name:
                return None
            try:
                return pull_checkpoint(self.bucket, self.base, name, scratch)
            except CuveeError as error:
                log(f"the checkpoint of step {int(name)} in the store can't be used: {error}")
        return None

    def clear(self) -> None:
        self.bucket.delete(*(name for name, _ in self.bucket.names(self.base)))


def _impatient(bucket: Bucket) -> Bucket:
    bucket.patience = PATIENCE_SECONDS
    return bucket


def push_checkpoint(bucket: Bucket, base: str, checkpoint: Path) -> int:
    """Send what the bucket lacks of the folder `<scratch>/checkpoints/<step>` and of the stage's metrics; then the
    manifest; then remove what is too old. Returns the bytes sent. Raises CuveeError, FileNotFoundError."""
    files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    if COMMIT not in files:
        raise FileNotFoundError(f"{checkpoint} is no committed checkpoint")
    if (metrics := checkpoint.parent.parent / METRICS).exists():
        files[f"../../{METRICS}"] = metrics
    there = {name for name, _ in bucket.names(f"{base}chunks/")}
    sent = 0
    table: dict[str, list[str]] = {}
    with ThreadPoolExecutor(TRANSFERS) as pool:
        for name, path in files.items():
            table[name], waiting = [], []
            for data in _chunks(path):
                digest = hashlib.sha256(data).hexdigest()
                table[name].append(digest)
                key = f"{base}chunks/{digest}"
                if key not in there:
                    there.add(key)
                    sent += len(data)
                    waiting.append(pool.submit(bucket.put, key, data))
                if len(waiting) > 2 * TRANSFERS:  # bounds the memory
                    waiting.pop(0).result()
            for one in waiting:
                one.result()
    bucket.put(f"{base}{checkpoint.name}.json", records.canonical(table))
    _remove_old(bucket, base)
    return sent


def pull_checkpoint(bucket: Bucket, base: str, name: str, scratch: Path) -> Path:
    """The checkpoint of step `name` as `<scratch>/checkpoints/<name>`, every chunk checked. Raises CuveeError where one
    is missing or not what was sent; then nothing is left."""
    found = bucket.get(f"{base}{name}.json")
    if found is None:
        raise CuveeError(f"{bucket.uri}/{base}{name}.json is gone")
    target = scratch / "checkpoints" / name
    part = target.with_name(f".{name}.{uuid.uuid4().hex}")
    try:
        with ThreadPoolExecutor(TRANSFERS) as pool:
            for file, digests in json.loads(found[0]).items():
                path = part / (METRICS + ".pulled" if file == f"../../{METRICS}" else _inside(file))
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "wb") as out:
                    for at in range(0, len(digests), TRANSFERS):
                        for data in pool.map(lambda one: _chunk(bucket, base, one), digests[at : at + TRANSFERS]):
                            out.write(data)
                    out.flush()
                    os.fsync(out.fileno())
        _check_index(part / INDEX)
        if (metrics := part / (METRICS + ".pulled")).exists():
            metrics.replace(scratch / METRICS)
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


class _Names(pickle.Unpickler):
    """Builds nothing: every class is a stand-in, and a name that no index has is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if not INDEX_NAMES.fullmatch(f"{module}.{name}"):
            raise CuveeError(f"its {INDEX} names {module}.{name}, which no checkpoint needs")
        return type(name, (_StandIn,), {})


class _StandIn(dict):
    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


def _check_index(path: Path) -> None:
    """Raises CuveeError where torch's reading of the index would run anything else than building the index."""
    if path.exists():
        with open(path, "rb") as file:
            try:
                _Names(file).load()
            except CuveeError:
                raise
            except Exception as error:
                raise CuveeError(f"its {INDEX} can't be read: {error}") from None


def _inside(name: str) -> str:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CuveeError(f"the manifest names {name!r}, which is outside the checkpoint")
    return name


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield data


def _chunk(bucket: Bucket, base: str, digest: str) -> bytes:
    found = bucket.get(f"{base}chunks/{digest}")
    if found is None or hashlib.sha256(found[0]).hexdigest() != digest:
        raise CuveeError(f"{bucket.uri}/{base}chunks/{digest} is missing or not what was sent")
    return found[0]


def _manifests(bucket: Bucket, base: str) -> list[str]:
    names = (name.removeprefix(base) for name, _ in bucket.names(base))
    return sorted(name.removesuffix(".json") for name in names if "/" not in name and name.endswith(".json"))


def _remove_old(bucket: Bucket, base: str) -> None:
    old, kept = _manifests(bucket, base)[:-KEPT], _manifests(bucket, base)[-KEPT:]
    bucket.delete(*(f"{base}{name}.json" for name in old))  # before the chunks: what is named is whole
    tables: list[dict[str, Any]] = [json.loads(found[0]) for name in kept if (found := bucket.get(f"{base}{name}.json"))]
    used = {f"{base}chunks/{digest}" for table in tables for digests in table.values() for digest in digests}
    bucket.delete(*(name for name, _ in bucket.names(f"{base}chunks/") if name not in used))
