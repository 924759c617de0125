"""Web archives: pages out of WARC responses, texts out of WET conversions, each with its address (FastWARC)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from stages.data.document import Document
from stages.data.formats.text import decode

SUFFIXES = {".warc", ".wet"}
UNPACKS = True  # a member of the gzip file a record
LONGEST = 16 << 20  # bytes of a page


def read(entry, file: BinaryIO) -> Iterator[Document]:
    """Every page of HTML or plain text that the server answered with status 200; other records are passed over."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    wanted = WarcRecordType.response | WarcRecordType.conversion
    for number, record in enumerate(ArchiveIterator(file, record_types=wanted, parse_http=True), 1):
        name, url = f"{entry.name}#{number}", record.headers.get("WARC-Target-URI", "")
        kind = (record.http_content_type if record.is_http else record.headers.get("Content-Type", "text/plain")) or ""
        if record.is_http and record.http_headers is not None and record.http_headers.status_code != 200:
            continue
        if not kind.startswith(("text/html", "text/plain", "application/xhtml")):
            continue
        data = record.reader.read(LONGEST + 1)
        fault = "page too long" if len(data) > LONGEST else "empty page" if not data.strip() else ""
        html = not kind.startswith("text/plain")
        text = decode(data, html) if not fault else data[:1000].decode("utf-8", "replace")
        yield Document(name, text, markup="html" if html else "", url=url, fault=fault)
