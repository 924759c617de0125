"""A running stage's checkpoints in the bucket, so that another host can go on from them.

`<uri>/scratch/<fingerprint>/<step>.json` names a checkpoint's files, those that the stage keeps beside it (metrics,
rollouts) and their chunks, and is written last; the chunks are objects named by their SHA-256, so that what was cut off,
or is repeated by another host, sends only what is not there.
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
BESIDE = (".jsonl", ".npz")  # what a stage keeps beside its checkpoints: its metrics, rollouts and their values
COMMIT = "commit.json"  # what makes a folder a checkpoint, see stages/trainer/checkpoint.py


class Mirror:
    """The checkpoints of one stage, `<scratch>/checkpoints/<step>/`, in a bucket. Every process that trains sends the files
    that it wrote, and one of them seals what all have sent: stages/trainer/mirroring.py."""

    def __init__(self, uri: str, endpoint: str, fingerprint: str, bucket: Bucket | None = None):
        self._open = (lambda: bucket) if bucket else (lambda: _impatient(Bucket(uri, endpoint)))
        self.base = f"scratch/{fingerprint}/"

    @cached_property
    def bucket(self) -> Bucket:
        return self._open()

    def send(self, checkpoint: Path, names: list[str]) -> dict[str, list[str]]:
        """Send what the bucket lacks of files of a committed checkpoint; with its mark goes what lies BESIDE it.
        Returns file, relative to the scratch folder -> SHA-256 of each of its chunks. Raises CuveeError, OSError."""
        scratch, files = checkpoint.parents[1], [checkpoint / name for name in names]
        if COMMIT in names:
            files += _beside(scratch)
        there = {name for name, _ in self.bucket.names(f"{self.base}chunks/")}
        table: dict[str, list[str]] = {}
        with ThreadPoolExecutor(TRANSFERS) as pool:
            waiting: list[Future] = []
            for path in files:
                name = path.relative_to(scratch).as_posix()
                table[name] = []
                for data in _chunks(path):
                    digest = hashlib.sha256(data).hexdigest()
                    table[name].append(digest)
                    key = f"{self.base}chunks/{digest}"
                    if key not in there:
                        there.add(key)
                        waiting.append(pool.submit(self.bucket.put, key, data))
                    if len(waiting) > 2 * TRANSFERS:  # bounds the memory
                        waiting.pop(0).result()
            for one in waiting:
                one.result()
        return table

    def seal(self, step: str, table: dict[str, list[str]]) -> None:
        """Name a checkpoint whose chunks are all there, then remove what is too old. No process may be sending: what it
        has sent is not named yet. Raises CuveeError."""
        self.bucket.put(f"{self.base}{step}.json", records.canonical(table))
        found = _manifests(self.bucket, self.base)
        self.bucket.delete(*(f"{self.base}{name}.json" for name in found[:-KEPT]))  # first: what is named is whole
        tables = [json.loads(one[0]) for name in found[-KEPT:] if (one := self.bucket.get(f"{self.base}{name}.json"))]
        used = {f"{self.base}chunks/{digest}" for one in tables for digests in one.values() for digest in digests}
        self.bucket.delete(*(name for name, _ in self.bucket.names(f"{self.base}chunks/") if name not in used))

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


def _beside(scratch: Path) -> list[Path]:
    return sorted(p for p in scratch.rglob("*") if p.suffix in BESIDE and scratch / "checkpoints" not in p.parents)


def _impatient(bucket: Bucket) -> Bucket:
    bucket.patience = PATIENCE_SECONDS
    return bucket


def pull_checkpoint(bucket: Bucket, base: str, name: str, scratch: Path) -> Path:
    """The checkpoint of step `name` as `<scratch>/checkpoints/<name>`, every chunk checked. Raises CuveeError where one
    is missing or not what was sent; then nothing is left."""
    found = bucket.get(f"{base}{name}.json")
    if found is None:
        raise CuveeError(f"{bucket.uri}/{base}{name}.json is gone")
    part, own = scratch / f".{name}.{uuid.uuid4().hex}", Path("checkpoints") / name
    try:
        with ThreadPoolExecutor(TRANSFERS) as pool:
            for file, digests in json.loads(found[0]).items():
                path = records.inside(part, file)
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "wb") as out:
                    for at in range(0, len(digests), TRANSFERS):
                        for data in pool.map(lambda one: _chunk(bucket, base, one), digests[at : at + TRANSFERS]):
                            out.write(data)
                    out.flush()
                    os.fsync(out.fileno())
        if not (part / own / COMMIT).exists():
            raise CuveeError(f"{bucket.uri}/{base}{name}.json names no committed checkpoint")
        _check_index(part / own / INDEX)
        for path in _beside(part):
            beside = scratch / path.relative_to(part)
            beside.parent.mkdir(exist_ok=True)
            path.replace(beside)
        shutil.rmtree(scratch / own, ignore_errors=True)
        (scratch / own).parent.mkdir(exist_ok=True)
        (part / own).replace(scratch / own)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return scratch / own


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
    names = (name.removeprefix(base).removesuffix(".json") for name, _ in bucket.names(base))
    return sorted(name for name in names if name.isdigit())
