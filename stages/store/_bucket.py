"""One S3 prefix: plain and conditional requests, and the service's errors as one sentence with the way out.

Every body is sent with its SHA-256 in the signature, which every service checks (`x-amz-content-sha256`); AWS also keeps
`x-amz-checksum-sha256`. Conditional writes (If-None-Match: *, If-Match) decide who wins; `check_conditions` tries them
once, because some services ignore them: AWS, MinIO and Ceph have both for PUT (Ceph 16 knows no quoted ETag there, and
ignores If-Match of DELETE, which is therefore not used); Google's S3 endpoint has neither and is refused.
"""

from __future__ import annotations

import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stages.stage import CuveeError

TRANSFERS = 8
ATTEMPTS = 4  # botocore's own at one request, within seconds
FIRST_SECONDS = 10.0  # that the first request is tried again: the service it names may not be there
PATIENCE_SECONDS = 900.0  # that later ones are: an outage ends no run
PAUSE_SECONDS = 20.0  # between two attempts, at most
MISSING = ("NoSuchKey", "404")
LOST = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409", *MISSING)
PASSING = ("InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout)", "(500)", "(502)", "(503)", "(504)")
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
    """Objects below s3://bucket/prefix. Raises CuveeError with the address, what failed and the way out.

    patience: seconds for which a request is tried again while the service can't be reached or fails.
    """

    def __init__(self, uri: str, endpoint: str = ""):
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
        config = Config(retries={"max_attempts": ATTEMPTS, "mode": "standard"}, max_pool_connections=2 * TRANSFERS,
                        connect_timeout=10, read_timeout=60, request_checksum_calculation=own,
                        response_checksum_validation=own, s3={"payload_signing_enabled": True})  # fmt: skip
        self._quoted: bool | None = None
        self._probing = threading.Lock()
        self.patience = FIRST_SECONDS
        try:
            self.s3 = self.ask(lambda: boto3.session.Session().client("s3", endpoint_url=endpoint or None, config=config))
        except ValueError as error:
            raise CuveeError(f"store.endpoint, AWS_ENDPOINT_URL: {error}; write it as http://host:port") from None
        self.ask(self.s3.list_objects_v2, Bucket=self.name, Prefix=self.key(""), MaxKeys=1)
        self.patience = PATIENCE_SECONDS

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def ask(self, call: Callable, none_for: tuple[str, ...] = (), patience: float | None = None, **arguments: Any) -> Any:
        """The answer to a call of boto3's; None where the service answers with an error of `none_for`. boto3's own
        attempts share a small budget, which an outage soon uses up."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        until, pause = 0.0, 1.0
        while True:
            try:
                return call(**arguments)
            except (BotoCoreError, ClientError, Boto3Error) as error:
                if isinstance(error, ClientError) and error.response["Error"]["Code"] in none_for:
                    return None
                until = until or time.monotonic() + (self.patience if patience is None else patience)
                if time.monotonic() > until or not passing(error):
                    where = f"store.uri={self.uri}" + (f" at {self.endpoint}" if self.endpoint else "")
                    raise CuveeError(f"{where}: {explanation(error)}") from None
            time.sleep(random.uniform(0.5, 1) * pause)
            pause = min(2 * pause, PAUSE_SECONDS)

    def names(self, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, {"Size", "LastModified", "ETag"}) of every object whose name begins with `prefix`."""
        pages = self.s3.get_paginator("list_objects_v2")
        found = self.ask(lambda: [item for page in pages.paginate(Bucket=self.name, Prefix=self.key(prefix))
                                  for item in page.get("Contents", [])])  # fmt: skip
        cut = len(self.key(""))
        yield from ((item["Key"][cut:], item) for item in found)

    def get(self, name: str, patience: float | None = None) -> tuple[bytes, str] | None:
        """(contents, ETag) of a small object, or None."""

        def read() -> tuple[bytes, str]:
            found = self.s3.get_object(Bucket=self.name, Key=self.key(name))
            return found["Body"].read(), found["ETag"]

        return self.ask(read, MISSING, patience)

    def head(self, name: str) -> dict[str, Any] | None:
        return self.ask(self.s3.head_object, MISSING, Bucket=self.name, Key=self.key(name))

    def put(self, name: str, data: bytes, absent: bool = False, replaces: str = "", patience: float | None = None) -> str:
        """Write an object; returns its ETag, or "" where a condition did not hold. absent: only if there is none yet;
        replaces: only if it still has this ETag. A lost answer makes the retry of a success look like a failure: who
        gets "" reads what is there before believing that another won."""
        condition: dict[str, str] = {"IfNoneMatch": "*"} if absent else {}
        if replaces:
            condition["IfMatch"] = replaces if self._quoted is not False else replaces.strip('"')
        answer = self.ask(self.s3.put_object, LOST if condition else (), patience, Bucket=self.name, Key=self.key(name),
                          Body=data, **condition, **self.checksum)
        return answer["ETag"] if answer else ""

    def delete(self, *names: str) -> None:
        # Not DeleteObjects: Google's endpoint lacks it, and it wants a checksum that Ceph ignores.
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda name: self.ask(self.s3.delete_object, Bucket=self.name, Key=self.key(name)), names))

    def check_conditions(self) -> None:
        """Raises CuveeError where the service ignores conditional writes; learns how it wants an ETag. Once a process."""
        with self._probing:
            if self._quoted is not None:
                return
            kept = False
            try:
                kept = self._keeps_conditions(f"probes/{uuid.uuid4().hex}")
            finally:
                self._quoted = self._quoted if kept else None
        if not kept:
            raise CuveeError(
                f"store.uri={self.uri}: this service ignores conditional writes (If-None-Match, If-Match of PUT), without "
                "which two runs could write one artifact; use AWS S3, MinIO or Ceph, or a shared folder as store.uri"
            )

    def _keeps_conditions(self, probe: str) -> bool:
        """Whether an object of that name is only written where it should be; sets how an ETag is given."""
        try:
            etag = self.put(probe, b"1", absent=True)
            etag = etag or (self.get(probe) or (b"", ""))[1]  # its answer was lost
            if not etag or self.put(probe, b"2", absent=True) or self.put(probe, b"2", replaces='"0"'):
                return False
            for self._quoted in (True, False):
                self.put(probe, b"3", replaces=etag)
                if (self.get(probe) or (b"", ""))[0] == b"3":
                    return not self.put(probe, b"4", replaces=etag)
            return False
        finally:
            self.delete(probe)


def passing(error: Exception) -> bool:
    """Whether the same request may succeed later: the network or the service failed, not what was asked."""
    from boto3.exceptions import RetriesExceededError
    from botocore import exceptions as botocore

    broken = (botocore.HTTPClientError, botocore.ConnectionError, botocore.ResponseStreamingError,
              botocore.IncompleteReadError, RetriesExceededError)  # fmt: skip
    return isinstance(error, broken) or any(code in str(error) for code in PASSING)


def explanation(error: Exception) -> str:
    """What a service's or boto3's error means, and the way out."""
    text = " ".join(str(error).split())
    for code, way in WAYS_OUT.items():
        if code in text:
            return f"{code}: {way}"
    return f"{text}; check the bucket, the credentials ({CREDENTIALS}), store.endpoint and the network"
