"""Files under an s3:// prefix; endpoint and credentials come from the usual AWS variables."""

from __future__ import annotations

import io
from typing import BinaryIO

from stages.data.sources._files import Entry, documents  # noqa: F401  (the same files, elsewhere)
from stages.stage import CuveeError


def entries(source: str) -> list[Entry]:
    """All objects under `s3://bucket/prefix`, sorted by name. Raises CuveeError when the bucket cannot be listed."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = source.removeprefix("s3://").partition("/")

    def refuse(error: Exception, what: str) -> CuveeError:
        reason = str(error).rstrip(".")
        return CuveeError(f"data.sources: {what} cannot be read ({reason}); check the address, "
                          "AWS_ENDPOINT_URL and the AWS credentials")

    try:
        client = boto3.client("s3")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = [item for page in pages for item in page.get("Contents", []) if not item["Key"].endswith("/")]
    except (BotoCoreError, ClientError, ValueError) as error:
        raise refuse(error, source) from None

    def entry(item: dict) -> Entry:
        key, tag, size = item["Key"], item["ETag"].strip('"'), item["Size"]
        short = key[len(prefix):].lstrip("/") or key.rsplit("/", 1)[-1]

        def opened() -> BinaryIO:
            cut = {"Range": f"bytes=0-{made.take - 1}"} if made.take < size else {}
            try:
                return io.BytesIO(client.get_object(Bucket=bucket, Key=key, IfMatch=tag, **cut)["Body"].read())
            except (BotoCoreError, ClientError) as error:
                raise refuse(error, f"s3://{bucket}/{key}") from None

        made = Entry(short, size, opened, lambda: f"{tag}:{made.take}", take=size)
        return made

    return sorted(map(entry, found), key=lambda entry: entry.name)
