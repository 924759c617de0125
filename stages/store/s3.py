"""Artifacts under an S3 prefix, through boto3; reading goes through a local cache folder.

The record is put last with `If-None-Match: *`: of two runs that publish one artifact, one wins and both end with the
same bytes. Credentials, region and role come from the usual AWS environment.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.stage import CuveeError
from stages.store import record as records
from stages.store.lease import BEAT_SECONDS, EXPIRY_SECONDS

TRANSFERS = 8


class S3Store:
    """`<uri>/artifacts/<fingerprint>/` as in LocalStore. uri: s3://bucket/prefix; endpoint: another S3 service.

    Raises CuveeError when the bucket can't be reached or written, or a downloaded file's digest is not as recorded.
    """

    def __init__(self, uri: str, cache: Path, endpoint: str = ""):
        import boto3
        from botocore.config import Config

        if not uri.startswith("s3://") or not uri[5:].strip("/"):
            raise CuveeError(f"store.uri={uri!r} is no S3 address; write it as s3://bucket/prefix")
        self.uri, self.cache = uri.rstrip("/"), cache
        self.bucket, _, self.prefix = self.uri[5:].partition("/")
        self.s3 = boto3.client("s3", endpoint_url=endpoint or None,
                               config=Config(retries={"max_attempts": 8, "mode": "standard"},
                                             max_pool_connections=2 * TRANSFERS))
        with self._explained():
            self.s3.head_bucket(Bucket=self.bucket)

    def folder(self, fingerprint: str) -> Path:
        return self.cache / fingerprint

    def record(self, fingerprint: str) -> dict[str, Any] | None:
        cached = self.folder(fingerprint) / records.NAME
        if cached.exists():  # records never change once they are written
            return json.loads(cached.read_bytes())
        data = self._get(f"artifacts/{fingerprint}/{records.NAME}")
        return None if data is None else json.loads(data)

    def fetch(self, fingerprint: str) -> Path:
        """Download what the cache lacks, every file checked against its recorded SHA-256."""
        folder, record = self.folder(fingerprint), self.record(fingerprint)
        if record is None:
            raise CuveeError(f"artifact {fingerprint} is not in the store {self.uri}; run the recipe that makes it")

        def one(item: tuple[str, dict[str, Any]]) -> None:
            name, meta = item
            path = folder / name
            if path.exists() and path.stat().st_size == meta["size"]:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            self.s3.download_file(self.bucket, self._key(f"artifacts/{fingerprint}/{name}"), str(part))
            if records.sha256(part) != meta["sha256"]:
                part.unlink()
                raise CuveeError(f"{self.uri}/artifacts/{fingerprint}/{name} is not what was published (SHA-256); "
                                 "delete that artifact in the bucket and run again to remake it")
            part.replace(path)

        with self._explained(), ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(one, record["files"].items()))
        records.write_atomic(folder / records.NAME, records.dumps(record))
        return folder

    def fetch_unchecked(self, fingerprint: str) -> Path:
        """A fresh copy of what the bucket holds, for `verify` to judge."""
        folder = self.cache / "verify" / fingerprint
        shutil.rmtree(folder, ignore_errors=True)
        prefix = self._key(f"artifacts/{fingerprint}/")
        with self._explained():
            for key in self._keys(prefix):
                path = folder / key.removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                self.s3.download_file(self.bucket, key, str(path))
        return folder

    def publish(self, out: Path, record: dict[str, Any]) -> dict[str, Any]:
        record, base = records.seal(record), f"artifacts/{record['fingerprint']}"
        with self._explained(), ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda name: self.s3.upload_file(str(out / name), self.bucket, self._key(f"{base}/{name}")),
                          record["files"]))
            if not self._put(f"{base}/{records.NAME}", records.dumps(record), IfNoneMatch="*"):
                record = json.loads(self._get(f"{base}/{records.NAME}"))
        folder = self.folder(record["fingerprint"])
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(out, folder)
        records.write_atomic(folder / records.NAME, records.dumps(record))
        return record

    @contextmanager
    def lease(self, fingerprint: str) -> Iterator[None]:
        """Wait for, then hold, the object leases/<fingerprint>; a holder that stopped beating is replaced."""
        import threading

        name, token, stop = f"leases/{fingerprint}", uuid.uuid4().hex, threading.Event()
        while not self._put(name, self._beat(token), IfNoneMatch="*"):
            held = self._get(name)
            if held is not None and time.time() - json.loads(held)["beat"] > EXPIRY_SECONDS:
                self._delete(name)
            time.sleep(1.0)

        def beat() -> None:
            while not stop.wait(BEAT_SECONDS):
                self._put(name, self._beat(token))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._delete(name)

    def set_alias(self, name: str, fingerprint: str) -> None:
        if self._get(f"aliases/{name}") != fingerprint.encode():
            self._put(f"aliases/{name}", fingerprint.encode())

    def aliases(self) -> dict[str, str]:
        prefix = self._key("aliases/")
        with self._explained():
            names = sorted(key.removeprefix(prefix) for key in self._keys(prefix))
        return {name: self._get(f"aliases/{name}").decode() for name in names}

    def fingerprints(self) -> Iterator[str]:
        with self._explained():
            for key in self._keys(self._key("artifacts/")):
                if key.endswith(f"/{records.NAME}"):
                    yield key.split("/")[-2]

    @staticmethod
    def _beat(token: str) -> bytes:
        return json.dumps({"token": token, "beat": time.time()}).encode()

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _keys(self, prefix: str) -> Iterator[str]:
        for page in self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
            yield from (item["Key"] for item in page.get("Contents", []))

    def _get(self, name: str) -> bytes | None:
        with self._explained():
            try:
                return self.s3.get_object(Bucket=self.bucket, Key=self._key(name))["Body"].read()
            except self.s3.exceptions.NoSuchKey:
                return None

    def _put(self, name: str, data: bytes, **condition: str) -> bool:
        """False when `condition` (If-None-Match) found the object there already."""
        from botocore.exceptions import ClientError

        with self._explained():
            try:
                self.s3.put_object(Bucket=self.bucket, Key=self._key(name), Body=data, **condition)
                return True
            except ClientError as error:
                if error.response["Error"]["Code"] in ("PreconditionFailed", "ConditionalRequestConflict", "412"):
                    return False
                raise

    def _delete(self, name: str) -> None:
        with self._explained():
            self.s3.delete_object(Bucket=self.bucket, Key=self._key(name))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """boto3's errors as one sentence with the way out."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError) as error:
            raise CuveeError(f"store.uri={self.uri}: {error}; check the bucket, the credentials (AWS_PROFILE, "
                             "AWS_ACCESS_KEY_ID) and store.endpoint") from None
