"""The record of an artifact: what it is, what made it, and the digests that prove it.

`record.json` is the commit mark: written last, atomically, in one canonical form, so that any changed byte shows.
Every input is named by its fingerprint (what made it) and by the digest of its record (what it is): the records of
all ancestors form a Merkle tree.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.stage import CuveeError

SCHEMA = 1
NAME = "record.json"


def canonical(value: Any) -> bytes:
    """JSON with one spelling: sorted keys, no spaces to vary, UTF-8."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def fingerprint(stage: str, version: str, config: dict, external: dict, inputs: dict) -> str:
    """The address of an artifact: 32 hexadecimal digits of SHA-256 over everything that decides its bytes.

    inputs: argument -> fingerprint, or argument -> {key: fingerprint}.
    """
    made_by = {"stage": stage, "version": version, "config": config, "external": external, "inputs": inputs}
    return hashlib.sha256(canonical(made_by)).hexdigest()[:32]


def input_fingerprints(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a record, reduced to what enters a fingerprint."""
    return {
        arg: one["fingerprint"] if "fingerprint" in one else {key: item["fingerprint"] for key, item in one.items()}
        for arg, one in inputs.items()
    }


def parents(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("arg" or "arg.key", {"fingerprint", "kind", "digest", "content"}) for each input of a record."""
    for arg, one in record["inputs"].items():
        if "fingerprint" in one:
            yield arg, one
        else:
            yield from ((f"{arg}.{key}", item) for key, item in one.items())


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the digest of all its other fields."""
    body = {key: value for key, value in record.items() if key != "digest"}
    return body | {"digest": hashlib.sha256(canonical(body)).hexdigest()}


def content(record: dict[str, Any]) -> str:
    """Digest of what an artifact is: its address and the SHA-256 of its files. Made again with the same bytes it is equal,
    where the digest of the record, which tells of times and machines, is not."""
    files = {name: one["sha256"] for name, one in record["files"].items()}
    return hashlib.sha256(canonical([record["fingerprint"], files])).hexdigest()


def dumps(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False).encode() + b"\n"


def digest_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> {"sha256", "size" in bytes} for every file below `folder` except the record."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != NAME:
            found[name] = {"sha256": sha256(path), "size": path.stat().st_size}
    return found


def inside(folder: Path, name: str) -> Path:
    """The place of a file that came with the name `name` from elsewhere. Raises CuveeError where it is not in `folder`."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CuveeError(f"{name!r} is no file of {folder}: its name leads out of that folder; nothing was written")
    return folder / name


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Return when a file's contents, or a folder's names, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that can't, for folders
            raise
    finally:
        os.close(file)


def write_atomic(path: Path, data: bytes) -> None:
    """All of `data` under `path`, or nothing: survives a crash at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # other threads may write the same
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)
