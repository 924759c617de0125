"""One S3 prefix: plain and conditional requests, and the service's errors as one sentence with the way out.

Every body is sent with its SHA-256 in the signature, which every service checks (`x-amz-content-sha256`); AWS also keeps
`x-amz-checksum-sha256`. Conditional writes (If-None-Match: *, If-Match) decide who wins; `check_conditions` tries them
once, because some services ignore them: AWS, MinIO and Ceph have both for PUT (Ceph 16 knows no quoted ETag there, and
ignores If-Match of DELETE, which is therefore not used); Google's S3 endpoint has neither and is refused.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stages.stage import CuveeError

TRANSFERS = 8
ATTEMPTS = 8
LOST = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "409", "404")
CREDENTIALS = "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
WAYS_OUT = {
    "NoSuchBucket": "there is no such bucket; create it, or check the name in store.uri",
    "InvalidBucketName": "no bucket can have that name; write store.uri as s3://bucket/prefix",
    "AccessDenied": "these credentials may not do that; give them list, get, put and delete on the prefix",
    "UserSuspended": "the service has suspended this user; ask who runs it",
    "InvalidAccessKeyId": f"the service does not know this access key; check {CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key is wrong; check {CREDENTIALS}",
    "ExpiredToken": "the session's credentials have expired; log in again",
    "RequestTimeTooSkewed": "this machine's clock is wrong by more than 15 minutes; set it (NTP), then run again",
    "QuotaExceeded": "the service's quota is used up; free some or ask for more, then run again",
}


class Bucket:
    """Objects below s3://bucket/prefix. Raises CuveeError with the address, what failed and the way out."""

    def __init__(self, uri: str, endpoint: str = "", attempts: int = ATTEMPTS):
        import boto3
        from botocore.config import Config

        if "@" in uri.partition("://")[2].partition("/")[0] or "@" in endpoint:
            raise CuveeError("store.uri, store.endpoint: an address must not hold credentials, it is shown and recorded; "
                             f"give them as {CREDENTIALS}")
        if not uri.startswith("s3://") or not uri[5:].strip("/"):
            raise CuveeError(f"store.uri={uri!r} is no S3 address; write it as s3://bucket/prefix")
        self.uri, self.endpoint = uri.rstrip("/"), endpoint
        self.name, _, self.prefix = self.uri[5:].partition("/")
        # Other services don't know AWS's newer checksums; the signed SHA-256 of each body they all know.
        own = "when_required" if endpoint or os.environ.get("AWS_ENDPOINT_URL") else "when_supported"
        self.checksum = {} if own == "when_required" else {"ChecksumAlgorithm": "SHA256"}
        with self.explained():
            self.s3 = boto3.session.Session().client("s3", endpoint_url=endpoint or None, config=Config(
                retries={"max_attempts": attempts, "mode": "standard"}, max_pool_connections=2 * TRANSFERS,
                connect_timeout=10, read_timeout=60, request_checksum_calculation=own, response_checksum_validation=own,
                s3={"payload_signing_enabled": True}))  # fmt: skip
            self.s3.list_objects_v2(Bucket=self.name, Prefix=self.key(""), MaxKeys=1)
        self._quoted: bool | None = None

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def names(self, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, {"Size", "LastModified", "ETag"}) of every object whose name begins with `prefix`."""
        cut = len(self.key(""))
        with self.explained():
            for page in self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self.key(prefix)):
                yield from ((item["Key"][cut:], item) for item in page.get("Contents", []))

    def get(self, name: str) -> tuple[bytes, str] | None:
        """(contents, ETag) of a small object, or None."""
        with self.explained():
            try:
                found = self.s3.get_object(Bucket=self.name, Key=self.key(name))
                return found["Body"].read(), found["ETag"]
            except self.s3.exceptions.NoSuchKey:
                return None

    def head(self, name: str) -> dict[str, Any] | None:
        from botocore.exceptions import ClientError

        with self.explained():
            try:
                return self.s3.head_object(Bucket=self.name, Key=self.key(name))
            except ClientError as error:
                if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                    return None
                raise

    def put(self, name: str, data: bytes, absent: bool = False, replaces: str = "") -> str:
        """Write an object; returns its ETag, or "" where a condition did not hold. absent: only if there is none yet;
        replaces: only if it still has this ETag. A lost answer makes the retry of a success look like a failure: who
        gets "" reads what is there before believing that another won."""
        from botocore.exceptions import ClientError

        condition: dict[str, str] = {"IfNoneMatch": "*"} if absent else {}
        if replaces:
            condition["IfMatch"] = replaces if self._quoted is not False else replaces.strip('"')
        with self.explained():
            try:
                return self.s3.put_object(Bucket=self.name, Key=self.key(name), Body=data, **condition, **self.checksum)["ETag"]
            except ClientError as error:
                if condition and error.response["Error"]["Code"] in LOST:
                    return ""
                raise

    def delete(self, *names: str) -> None:
        with self.explained():
            for name in names:  # not DeleteObjects: Google's endpoint lacks it, and it wants a checksum that Ceph ignores
                self.s3.delete_object(Bucket=self.name, Key=self.key(name))

    def check_conditions(self) -> None:
        """Raises CuveeError where the service ignores conditional writes; learns how it wants an ETag. Once a process."""
        if self._quoted is not None:
            return
        probe = f"probes/{uuid.uuid4().hex}"
        try:
            etag = self.put(probe, b"1", absent=True)
            kept = etag and not self.put(probe, b"2", absent=True) and not self.put(probe, b"2", replaces='"0"')
            for self._quoted in (True, False):
                if kept and (replaced := self.put(probe, b"3", replaces=etag)):
                    kept = not self.put(probe, b"4", replaces=etag) and (self.get(probe) or (b"", ""))[1] == replaced
                    break
            else:
                kept = ""
        finally:
            self.delete(probe)
        if not kept:
            self._quoted = None
            raise CuveeError(
                f"store.uri={self.uri}: this service ignores conditional writes (If-None-Match, If-Match of PUT), without "
                "which two runs could write one artifact; use AWS S3, MinIO or Ceph, or a shared folder as store.uri"
            )

    @contextmanager
    def explained(self) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError, Boto3Error) as error:
            where = f"store.uri={self.uri}" + (f" at {self.endpoint}" if self.endpoint else "")
            raise CuveeError(f"{where}: {explanation(error)}") from None


def explanation(error: Exception) -> str:
    """What a service's or boto3's error means, and the way out."""
    text = " ".join(str(error).split())
    for code, way in WAYS_OUT.items():
        if code in text:
            return f"{code}: {way}"
    return f"{text}; check the bucket, the credentials ({CREDENTIALS}), store.endpoint and the network"
