"""Files under an s3:// prefix; endpoint and credentials come from the usual AWS variables."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO

from stages.data.sources._files import Entry, documents  # noqa: F401  (the same files, elsewhere)
from stages.stage import CuveeError

BLOCK = 8 << 20  # bytes of a request
PAUSES = (1, 4, 16)  # seconds before a request whose answer broke off is sent again


@dataclass
class Object(Entry):
    """An object of a bucket; path: `bucket/key`. tag: the ETag it had when it was listed."""

    tag: str = ""

    def open(self) -> BinaryIO:
        """A stream of the object, in requests of BLOCK bytes. Reading raises CuveeError when it cannot be read or has changed."""
        return io.BufferedReader(_Stream(self), BLOCK)

    def digest(self) -> str:
        return f"{self.tag}:{self.take}"


class _Stream(io.RawIOBase):
    """An object by ranges: a reader may jump, and a connection that breaks off costs one request."""

    def __init__(self, entry: Object):
        self.entry, self.place = entry, 0

    def readinto(self, buffer: Any) -> int:
        stop = min(self.place + len(buffer), self.entry.size)
        data = self._bytes(stop) if self.place < stop else b""
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)

    def readall(self) -> bytes:
        """What is left, in one request."""
        data = self._bytes(self.entry.size) if self.place < self.entry.size else b""
        self.place += len(data)
        return data

    def _bytes(self, stop: int) -> bytes:
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, key = self.entry.path.partition("/")
        for pause in (*PAUSES, None):
            try:
                wanted = f"bytes={self.place}-{stop - 1}"
                return client().get_object(Bucket=bucket, Key=key, IfMatch=self.entry.tag, Range=wanted)["Body"].read()
            except (BotoCoreError, ClientError) as error:  # what a client can try again, botocore has
                if pause is None or isinstance(error, ClientError):
                    raise refused(error, f"s3://{self.entry.path}") from None
                time.sleep(pause)
        raise AssertionError

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = offset + (0, self.place, self.entry.size)[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readable(self) -> bool:
        return True

    seekable = readable


@cache
def client() -> Any:
    """This process's client; one that was made before a fork would share its connections."""
    import boto3

    return boto3.client("s3")


def refused(error: Exception, what: str) -> CuveeError:
    """The sentence for what S3 would not give."""
    reason = str(error).rstrip(".")
    return CuveeError(f"data.sources: {what} cannot be read ({reason}); check the address, "
                      "AWS_ENDPOINT_URL and the AWS credentials")


def entries(source: str) -> list[Entry]:
    """All objects under `s3://bucket/prefix`, sorted by name. Raises CuveeError when the bucket cannot be listed."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    try:
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = [item for page in pages for item in page.get("Contents", []) if not item["Key"].endswith("/")]
    except (BotoCoreError, ClientError, ValueError) as error:
        raise refused(error, source) from None
    finally:
        client.cache_clear()

    def entry(item: dict) -> Entry:
        key, size = item["Key"], item["Size"]
        short = key[len(prefix):].lstrip("/") or key.rsplit("/", 1)[-1]
        return Object(short, size, f"{bucket}/{key}", take=size, tag=item["ETag"].strip('"'))

    return sorted(map(entry, found), key=lambda entry: entry.name)
