"""Files under an s3:// prefix; endpoint and credentials come from the usual AWS variables."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO

from stages.data.sources._files import Entry, documents  # noqa: F401  (the same files, elsewhere)
from stages.stage import CuveeError


@dataclass
class Object(Entry):
    """An object of a bucket; path: `bucket/key`. tag: the ETag it had when it was listed."""

    tag: str = ""

    def open(self) -> BinaryIO:
        """A stream of the bytes taken. Raises CuveeError when they cannot be read or have changed."""
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, key = self.path.partition("/")
        cut = {"Range": f"bytes=0-{self.take - 1}"} if self.take < self.size else {}
        try:
            return io.BufferedReader(client().get_object(Bucket=bucket, Key=key, IfMatch=self.tag, **cut)["Body"], 1 << 20)
        except (BotoCoreError, ClientError) as error:
            raise refused(error, f"s3://{self.path}") from None

    def seekable(self) -> BinaryIO:
        with self.open() as file:
            return io.BytesIO(file.read())

    def digest(self) -> str:
        return f"{self.tag}:{self.take}"


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
