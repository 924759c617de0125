"""Whole files: code by extension, HTML, everything else as prose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from stages.data.document import Document

LIBRARIES = ("resiliparse",)  # finds the charset
CODE = set(
    ".py .pyi .java .c .h .cc .cpp .cxx .hpp .rs .go .js .mjs .jsx .ts .tsx .cob .cbl .sql .rb .php .swift .kt .scala"
    " .cs .sh .bash .pl .lua .r .jl .hs .ml .clj .ex .erl .css .scss .yaml .yml .toml .ini .cmake .proto .vue".split()
)
HTML = {".html", ".htm", ".xhtml"}
SUFFIXES = CODE | HTML | {".txt", ".md", ".rst"}  # and whatever no other format claims
LONGEST = 64 << 20  # bytes


def read(entry, file: BinaryIO) -> Iterator[Document]:
    """One document. Binary files and files above LONGEST come with their `fault` set."""
    head = file.read(8192)
    if b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        yield Document(entry.name, "", fault=f"binary file: {entry.kind or 'no extension'}")
        return
    data = head + file.read(LONGEST)
    if len(data) > LONGEST:
        yield Document(entry.name, head.decode("utf-8", "replace"), fault=f"file too long: above {LONGEST >> 20} MiB; cut it")
        return
    html, code = entry.kind in HTML, entry.kind in CODE
    yield Document(entry.name, decode(data, html), "code" if code else "prose", markup="html" if html else "")


def decode(data: bytes, html: bool = False) -> str:
    """Bytes as text: UTF-8, a byte order mark, the page's own charset, or the most likely one (uchardet)."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding

        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            return data.decode("utf-16", "replace")
        # The WHATWG mapping would turn Korean's cp949 into UTF-8; all it is needed for is cp1252.
        found = detect_encoding(data, html5_compatible=False, from_html_meta=html)
        return bytes_to_str(data, "cp1252" if found in (None, "iso8859-1") else found, "replace", ("cp1252",))
