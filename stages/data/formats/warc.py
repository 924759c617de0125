"""Web archives: pages out of WARC responses, texts out of WET conversions, each with its address (FastWARC)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from stages.data.document import Document
from stages.data.formats.text import decode

LIBRARIES = ("fastwarc", "resiliparse")
SUFFIXES = {".warc", ".wet"}
UNPACKS = True  # a member of the gzip file a record
PACKED = {".gz", ".zst"}  # what FastWARC unpacks
LONGEST = 16 << 20  # bytes of a page
CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")


def read(entry, file: BinaryIO) -> Iterator[Document]:
    """Every page of HTML or plain text that the server answered with status 200; other records are passed over.

    What cannot be read comes with its `fault` set: a record cut short, bytes that are no archive, an unknown encoding.
    """
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    if entry.compressed and entry.ending not in PACKED:
        yield Document(entry.name, "", fault=f"web archive packed as {entry.ending[1:]}: pack it with gzip, a member a record")
        return
    wanted = WarcRecordType.response | WarcRecordType.conversion
    try:
        # HTTP's encodings are undone here: where one is damaged, FastWARC would lose the records behind it.
        for number, record in enumerate(ArchiveIterator(_Forward(file), record_types=wanted, parse_http=True), 1):
            if (found := _page(f"{entry.name}#{number}", record)) is not None:
                yield found
    except OSError as error:
        if error.errno:  # the disk, not the archive
            raise
        yield Document(entry.name, "", fault=f"damaged web archive: {str(error)[:80]}")


class _Forward:
    """A stream that tells where it is though it cannot jump, as those from a bucket: FastWARC asks, and panics without."""

    def __init__(self, file: BinaryIO):
        self.file, self.place = file, 0

    def read(self, count: int = -1) -> bytes:
        data = self.file.read(count)
        self.place += len(data)
        return data

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = 0) -> int:
        if (offset, whence) not in ((0, 1), (self.place, 0)):
            raise OSError("this stream only goes forward")
        return self.place


def _page(name: str, record) -> Document | None:
    data, url = record.reader.read(LONGEST + 1), record.headers.get("WARC-Target-URI", "")
    if "Content-Length" not in record.headers or len(data) < min(record.content_length, LONGEST + 1):
        return Document(name, data[:1000].decode("utf-8", "replace"), url=url, fault="record cut short")
    kind = record.headers.get("Content-Type", "text/plain")
    headers = {}
    if record.is_http and record.http_headers is not None:
        if record.http_headers.status_code != 200:
            return None
        headers = {key.lower(): value.lower() for key, value in record.http_headers}
        kind = headers.get("content-type", "")
    kind = kind.strip().lower()
    if not kind.startswith(("text/html", "text/plain", "application/xhtml")):
        return None
    data, fault = _content(data, headers)
    fault = fault or ("page too long" if len(data) > LONGEST else "empty page" if not data.strip() else "")
    html = not kind.startswith("text/plain")
    text = decode(data, html) if not fault else data[:1000].decode("utf-8", "replace")
    return Document(name, text, markup="html" if html else "", url=url, fault=fault)


def _content(data: bytes, headers: dict[str, str]) -> tuple[bytes, str]:
    """The page without HTTP's encodings, and a fault; many crawlers undo them and leave the headers as they were."""
    if "chunked" in headers.get("transfer-encoding", ""):
        data = _joined(data)
    encoding = headers.get("content-encoding", "").strip().removeprefix("x-")
    if encoding in ("gzip", "deflate"):
        for bits in (47, -15) if encoding == "deflate" else (47,):  # with gzip's or zlib's header, without any
            try:
                return zlib.decompressobj(bits).decompress(data, LONGEST + 1), ""
            except zlib.error:
                continue
    if encoding not in ("", "identity"):
        try:
            data.decode()
        except UnicodeDecodeError:
            return data, f"damaged or unknown content encoding: {encoding[:20]}"
    return data, ""


def _joined(data: bytes) -> bytes:
    """The chunks as one (RFC 9112, section 7.1); what does not begin with one stays as it is."""
    found, place = [], 0
    while (head := CHUNK.match(data, place)) and (length := int(head[1], 16)):
        found.append(data[head.end() : head.end() + length])
        place = head.end() + length + 2
    return b"".join(found) if found else data
