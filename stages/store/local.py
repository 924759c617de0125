"""Artifacts as folders of a local (or shared) file system."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.stage import CuveeError
from stages.store import record as records
from stages.store.lease import FileLease


class LocalStore:
    """`root/artifacts/<fingerprint>/` holds an artifact's files and its record; `root/aliases/<name>` names one.

    Raises CuveeError when the folder can't be written, an artifact is not there, or a file's size is not as recorded.
    """

    def __init__(self, root: Path):
        self.root = Path(root).expanduser().absolute()
        self.uri = str(self.root)
        try:
            (self.root / "artifacts").mkdir(parents=True, exist_ok=True)
            (self.root / "aliases").mkdir(exist_ok=True)
        except OSError as error:
            raise CuveeError(f"store.uri={self.uri}: {error.strerror}; give a folder that you may write") from None
        if not os.access(self.root / "artifacts", os.W_OK):
            raise CuveeError(f"store.uri={self.uri}: no permission to write there; give a folder that you may write")

    def folder(self, fingerprint: str) -> Path:
        return self.root / "artifacts" / fingerprint

    def record(self, fingerprint: str) -> dict[str, Any] | None:
        """The record of a published artifact, or None: without a record there is no artifact."""
        try:
            return json.loads((self.folder(fingerprint) / records.NAME).read_bytes())
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise CuveeError(
                f"{self.folder(fingerprint) / records.NAME} is not JSON: the record was damaged; "
                "delete that folder and run again to remake it"
            ) from None

    def fetch(self, fingerprint: str) -> Path:
        """A local folder with the artifact's files, their sizes checked."""
        record, folder = self.record(fingerprint), self.folder(fingerprint)
        if record is None:
            raise CuveeError(f"artifact {fingerprint} is not in the store {self.uri}; run the recipe that makes it")
        for name, meta in record["files"].items():
            path = folder / name
            found = path.stat().st_size if path.exists() else "nothing"
            if found != meta["size"]:
                raise CuveeError(f"{path}: found {found}, the record says {meta['size']} bytes; "
                                 f"delete {folder} and run again to remake it")
        return folder

    def release(self, fingerprint: str) -> None:
        """What S3Store has to be told of; here nothing is ever removed."""

    def contents(self, fingerprint: str) -> tuple[bytes, dict[str, str]]:
        """(the record's bytes, file -> SHA-256) of what the folder holds now, for `verify` to judge."""
        folder = self.folder(fingerprint)
        files = {name: meta["sha256"] for name, meta in records.digest_files(folder).items()}
        return (folder / records.NAME).read_bytes(), files

    def publish(self, out: Path, record: dict[str, Any]) -> dict[str, Any]:
        """Move `out` into the store, then write its record. Returns the sealed record."""
        folder = self.folder(record["fingerprint"])
        if folder.exists():  # files of a publication that a crash cut off before its record
            shutil.rmtree(folder)
        shutil.move(out, folder)
        for name in record["files"]:  # safetensors writes for its owner alone; who may read the store may read a model
            (folder / name).chmod(folder.stat().st_mode & 0o666)
        for path in [*(p for p in folder.rglob("*") if p.is_file()), folder, folder.parent]:
            records.sync(path)  # or a power failure could keep the record and lose what it names
        record = records.seal(record)
        records.write_atomic(folder / records.NAME, records.dumps(record))
        return record

    def lease(self, fingerprint: str) -> FileLease:
        return FileLease(self.root / "leases" / fingerprint)

    def mirror(self, fingerprint: str) -> None:
        """None: a stage's checkpoints lie in its scratch folder, and nowhere else."""

    def restore(self, fingerprint: str, scratch: Path, log: Any) -> None:
        """What S3Store brings from its mirror; here there is none."""

    def forget(self, fingerprint: str) -> None:
        """What S3Store removes of a published stage; here there is nothing."""

    def set_alias(self, name: str, fingerprint: str) -> None:
        if self.aliases().get(name) != fingerprint:
            records.write_atomic(self.root / "aliases" / name, fingerprint.encode())

    def aliases(self) -> dict[str, str]:
        """Name -> fingerprint of the artifact that the last run knew under that name."""
        files = (p for p in (self.root / "aliases").iterdir() if not p.name.startswith("."))
        return {p.name: p.read_text().strip() for p in sorted(files)}

    def fingerprints(self) -> Iterator[str]:
        yield from sorted(p.parent.name for p in (self.root / "artifacts").glob(f"*/{records.NAME}"))
