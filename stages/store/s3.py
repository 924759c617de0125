"""Artifacts under an S3 prefix, through boto3; reading goes through a local cache folder.

`<uri>/artifacts/<fingerprint>/record.json` is the commit mark, put last with `If-None-Match: *`: of two runs that
publish one artifact, one wins and the other takes the winner's. The files lie in a folder beside it that is named by
what they contain, so that an upload that was cut off goes on where it stopped, and two runs whose bytes differ never
write one object. Credentials, region and role come from the usual AWS environment.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stages.stage import CuveeError
from stages.store import record as records
from stages.store._bucket import TRANSFERS, Bucket
from stages.store._cache import GB, Cache
from stages.store.lease import ObjectLease
from stages.store.mirror import Mirror

PART_BYTES = 16 * 1024 * 1024  # of a multipart transfer
logger = logging.getLogger("cuvee.store")
DOWNLOADS = 3  # attempts at a file that arrives with other bytes than were published


class S3Store:
    """As LocalStore, in a bucket. uri: s3://bucket/prefix; endpoint: another S3 service; cache_gb: size of the cache
    (0: no limit), which what is in use may exceed.

    Raises CuveeError when the bucket can't be reached or written, ignores conditional writes, or a downloaded file's
    SHA-256 is not as recorded.
    """

    def __init__(self, uri: str, cache: Path, endpoint: str = "", cache_gb: float = 0):
        from boto3.s3.transfer import TransferConfig

        self.bucket = Bucket(uri, endpoint)
        self.uri = self.bucket.uri
        self.cache = Cache(Path(cache), int(cache_gb * GB))
        self._transfer = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES,
                                        max_concurrency=TRANSFERS, num_download_attempts=8)
        self._records: dict[str, dict[str, Any]] = {}

    def folder(self, fingerprint: str) -> Path:
        """Where the artifact's files are on this machine, once they were fetched."""
        return self.cache.folder / fingerprint

    def record(self, fingerprint: str) -> dict[str, Any] | None:
        """The record of a published artifact, or None: without a record there is no artifact."""
        if fingerprint not in self._records:  # it never changes once it is written
            found = self.bucket.get(f"artifacts/{fingerprint}/{records.NAME}")
            if found is None:
                return None
            try:
                self._records[fingerprint] = json.loads(found[0])
            except ValueError:
                raise CuveeError(f"{self.uri}/artifacts/{fingerprint}/{records.NAME} is not JSON: the record was "
                                 "damaged; delete that folder and run again to remake it") from None
        return self._records[fingerprint]

    def fetch(self, fingerprint: str) -> Path:
        """A local folder with the artifact's files: what the cache lacks is downloaded and checked against its recorded
        SHA-256. It stays until `release` is called as often as this, or this process ends."""
        record = self.record(fingerprint)
        if record is None:
            raise CuveeError(f"artifact {fingerprint} is not in the store {self.uri}; run the recipe that makes it")
        folder = self.cache.hold(fingerprint)
        try:
            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(lambda name: self._download(record, name, records.inside(folder, name)), record["files"]))
            if not (folder / records.NAME).exists():
                records.write_atomic(folder / records.NAME, records.dumps(record))
        except BaseException:
            self.cache.release(fingerprint)
            raise
        self.cache.trim()
        return folder

    def release(self, fingerprint: str) -> None:
        """The folder that `fetch` returned is no longer in use."""
        self.cache.release(fingerprint)

    def _download(self, record: dict[str, Any], name: str, path: Path) -> None:
        wanted = record["files"][name]
        if path.exists() and path.stat().st_size == wanted["size"]:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            for _ in range(DOWNLOADS):
                self.bucket.ask(self.bucket.s3.download_file, Bucket=self.bucket.name, Filename=str(part),
                                Key=self.bucket.key(place(record) + name), Config=self._transfer)
                if records.sha256(part) == wanted["sha256"]:
                    part.replace(path)
                    return
        finally:
            part.unlink(missing_ok=True)
        raise CuveeError(f"{self.uri}/{place(record)}{name} is not what was published (SHA-256); delete that artifact "
                         "in the bucket and run again to remake it")

    def contents(self, fingerprint: str) -> tuple[bytes, dict[str, str]]:
        """(the record's bytes, file -> SHA-256) of what the bucket holds now, for `verify` to judge."""
        record = self.record(fingerprint)
        base = place(record)

        def digest(name: str) -> str:
            found = hashlib.sha256()
            body = self.bucket.s3.get_object(Bucket=self.bucket.name, Key=self.bucket.key(name))["Body"]
            for chunk in body.iter_chunks(1 << 20):
                found.update(chunk)
            return found.hexdigest()

        names = [name for name, _ in self.bucket.names(base)]
        with ThreadPoolExecutor(TRANSFERS) as pool:
            digests = pool.map(lambda name: self.bucket.ask(digest, name=name), names)
            files = {name.removeprefix(base): one for name, one in zip(names, digests, strict=True)}
        return (self.bucket.get(f"artifacts/{fingerprint}/{records.NAME}") or (b"", ""))[0], files

    def publish(self, out: Path, record: dict[str, Any]) -> dict[str, Any]:
        """Upload `out`, then the record. Returns the sealed record: another run's where that was first."""
        ours, fingerprint = records.seal(record), record["fingerprint"]
        mark = f"artifacts/{fingerprint}/{records.NAME}"
        self.bucket.check_conditions()
        there = {name: item["Size"] for name, item in self.bucket.names(place(ours))}
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda name: self._upload(ours, name, out / name, there), ours["files"]))
        won = self.bucket.put(mark, records.dumps(ours), absent=True)
        record = self._records[fingerprint] = ours if won else json.loads(self.bucket.get(mark)[0])
        folder = self.cache.hold(fingerprint)
        try:
            if record["digest"] == ours["digest"]:
                shutil.rmtree(folder, ignore_errors=True)
                shutil.move(out, folder)
                records.write_atomic(folder / records.NAME, records.dumps(record))
            else:  # another run's, which others may be reading here: it is downloaded when it is wanted
                shutil.rmtree(out)
        finally:
            self.cache.release(fingerprint)
        self.cache.trim()
        return record

    def _upload(self, record: dict[str, Any], name: str, path: Path, there: dict[str, int]) -> None:
        key, wanted = place(record) + name, record["files"][name]
        if there.get(key) == wanted["size"] and self._digest(key) == wanted["sha256"]:
            return  # an attempt that was cut off had sent this one
        extra = {"Metadata": {"sha256": wanted["sha256"]}, **self.bucket.checksum}
        self.bucket.ask(self.bucket.s3.upload_file, Filename=str(path), Bucket=self.bucket.name,
                        Key=self.bucket.key(key), ExtraArgs=extra, Config=self._transfer)
        found = self.bucket.head(key)
        if found is None or found["ContentLength"] != wanted["size"] or records.sha256(path) != wanted["sha256"]:
            raise CuveeError(f"{self.uri}/{key}: {found and found['ContentLength']} bytes arrived of {wanted['size']}; "
                             "nothing was published, run again")

    def _digest(self, key: str) -> str | None:
        return (self.bucket.head(key) or {"Metadata": {}})["Metadata"].get("sha256")

    def lease(self, fingerprint: str) -> ObjectLease:
        self.bucket.check_conditions()
        return ObjectLease(self.bucket, f"leases/{fingerprint}")

    def mirror(self, fingerprint: str) -> dict[str, str]:
        """What a stage needs to keep its checkpoints in the store while it runs: the arguments of `Mirror`."""
        return {"uri": self.uri, "endpoint": self.bucket.endpoint, "fingerprint": fingerprint}

    def restore(self, fingerprint: str, scratch: Path, log: Callable[[str], None]) -> None:
        """Bring the stage's newest checkpoint to `scratch`, where another host had begun to make it."""
        Mirror(self.uri, self.bucket.endpoint, fingerprint, self.bucket).pull(scratch, log)

    def forget(self, fingerprint: str) -> None:
        """Remove the checkpoints of a stage whose artifact is published."""
        try:
            Mirror(self.uri, self.bucket.endpoint, fingerprint, self.bucket).clear()
        except CuveeError as error:
            logger.warning("checkpoints of a finished stage stay until `cuvee clean`: %s", error)

    def set_alias(self, name: str, fingerprint: str) -> None:
        found = self.bucket.get(f"aliases/{name}")
        if found is None or found[0] != fingerprint.encode():
            self.bucket.put(f"aliases/{name}", fingerprint.encode())

    def aliases(self) -> dict[str, str]:
        """Name -> fingerprint of the artifact that the last run knew under that name."""
        names = sorted(name.removeprefix("aliases/") for name, _ in self.bucket.names("aliases/"))
        with ThreadPoolExecutor(TRANSFERS) as pool:
            found = pool.map(lambda name: self.bucket.get(f"aliases/{name}"), names)
        return {name: one[0].decode() for name, one in zip(names, found, strict=True) if one}

    def fingerprints(self) -> Iterator[str]:
        for name, _ in self.bucket.names("artifacts/"):
            if name.endswith(f"/{records.NAME}") and name.count("/") == 2:
                yield name.split("/")[1]


def place(record: dict[str, Any]) -> str:
    """The beginning of the names of an artifact's files: a function of their names, sizes and digests."""
    contents = hashlib.sha256(records.canonical(record["files"])).hexdigest()[:12]
    return f"artifacts/{record['fingerprint']}/{contents}/"
