"""What may be removed from a store: what was never published, and is too old to be still on its way. Nothing else.

A published artifact is never touched. Everything is removed under the artifact's lease, so that nobody is publishing it,
and its age is told by the server (or the file system) that keeps it, not by this machine's clock.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from stages.store import record as records
from stages.store.local import LocalStore
from stages.store.s3 import S3Store, place

DAY = 86400


def clean(store: LocalStore | S3Store, days: float, work: Path) -> Iterator[str]:
    """Remove what is older than `days` and was never published, from the store and from `work`, where stages of this
    machine (or volume) are made; yields a line for each thing removed."""
    age = days * DAY
    if isinstance(store, S3Store):
        yield from _clean_bucket(store, age)
    else:
        yield from _clean_folders(store, store.root / "artifacts", age, "files without a record")
    if work.is_dir():
        yield from _clean_folders(store, work, age, "checkpoints of a stage that was never finished")


def _clean_folders(store: LocalStore | S3Store, parent: Path, age: float, what: str) -> Iterator[str]:
    """Of folders that are named by addresses."""
    now = _touched_now(parent)
    for folder in sorted(path for path in parent.iterdir() if path.is_dir()):
        newest = max((p.stat().st_mtime for p in [folder, *folder.rglob("*")]), default=now)
        if now - newest > age and store.record(folder.name) is None:
            lease = store.lease(folder.name)
            if lease.acquire():
                try:
                    if store.record(folder.name) is None:
                        shutil.rmtree(folder)
                        yield f"{folder}: {what}"
                finally:
                    lease.release()


def _touched_now(folder: Path) -> float:
    """The file system's own time."""
    probe = folder / f".now.{time.monotonic_ns()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _clean_bucket(store: S3Store, age: float) -> Iterator[str]:
    bucket = store.bucket
    now = _server_time(store)

    def old(item: dict[str, Any]) -> bool:
        return now - item["LastModified"] > timedelta(seconds=age)

    def by_fingerprint(folder: str) -> dict[str, dict[str, bool]]:
        """Of each artifact its objects in the folder, and whether they are old."""
        found: dict[str, dict[str, bool]] = defaultdict(dict)
        for name, item in bucket.names(folder):
            found[name.split("/")[1]][name] = old(item)
        return found

    for fingerprint, names in by_fingerprint("artifacts/").items():
        yield from _clean_artifact(store, fingerprint, names)
    for fingerprint, names in by_fingerprint("scratch/").items():
        if all(names.values()):
            yield from _remove(store, fingerprint, list(names), "checkpoints")
    pages = bucket.s3.get_paginator("list_multipart_uploads")
    for upload in bucket.ask(lambda: [item for page in pages.paginate(Bucket=bucket.name, Prefix=bucket.key(""))
                                      for item in page.get("Uploads", [])]):  # fmt: skip
        if now - upload["Initiated"] > timedelta(seconds=age):
            bucket.ask(bucket.s3.abort_multipart_upload, Bucket=bucket.name, Key=upload["Key"],
                       UploadId=upload["UploadId"])
            yield f"{upload['Key']}: an upload that was cut off"


def _clean_artifact(store: S3Store, fingerprint: str, names: dict[str, bool]) -> Iterator[str]:
    record = store.record(fingerprint)
    if record is None:
        if all(names.values()):  # not one that is being uploaded now
            yield from _remove(store, fingerprint, list(names), "files without a record")
        return
    kept = (place(record), f"artifacts/{fingerprint}/{records.NAME}")
    lost = [name for name, is_old in names.items() if is_old and not name.startswith(kept)]
    yield from _remove(store, fingerprint, lost, "files of a run that published second")


def _remove(store: S3Store, fingerprint: str, names: list[str], what: str) -> Iterator[str]:
    if not names:
        return
    before = store.record(fingerprint)
    lease = store.lease(fingerprint)
    if not lease.acquire():
        return  # somebody makes it now
    try:
        if store.record(fingerprint) != before:  # published meanwhile
            return
        store.bucket.delete(*names)
        yield f"{store.uri}: {what} of {fingerprint[:12]} ({len(names)} objects)"
    finally:
        lease.release(done=before is not None)


def _server_time(store: S3Store) -> Any:
    bucket = store.bucket
    answer = bucket.ask(bucket.s3.list_objects_v2, Bucket=bucket.name, Prefix=bucket.key(""), MaxKeys=1)
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
