"""Mail: a file a message (.eml), or archives of them (.mbox)."""

from __future__ import annotations

from collections.abc import Iterator
from email import policy
from email.parser import BytesParser
from typing import BinaryIO

from stages.data.document import Document

SUFFIXES = {".eml", ".mbox"}
LONGEST = 32 << 20  # bytes of a message


def read(entry, file: BinaryIO) -> Iterator[Document]:
    """Every message: its subject and its body, plain text where there is some, without attachments."""
    parser = BytesParser(policy=policy.default)
    for number, data in enumerate(_messages(file) if entry.kind == ".mbox" else [file.read(LONGEST)], 1):
        name = f"{entry.name}#{number}" if entry.kind == ".mbox" else entry.name
        try:
            message = parser.parsebytes(data)
            body = message.get_body(("plain", "html"))
            text = body.get_content().strip() if body is not None else ""
            subject, html = str(message["subject"] or ""), body is not None and body.get_content_type() == "text/html"
            url = str(message["message-id"] or "").strip()
        except Exception as error:  # the standard library's parser raises many kinds on hostile headers
            yield Document(name, data[:1000].decode("utf-8", "replace"), fault=f"damaged message: {type(error).__name__}")
            continue
        if html:
            yield Document(name, text, markup="html", url=url)
        else:
            yield Document(name, f"{subject}\n\n{text}\n" if subject else text + "\n", url=url,
                           fault="" if text else "message without text")


def _messages(file: BinaryIO) -> Iterator[bytes]:
    """Messages of an mbox file: each begins with a line "From " after an empty line."""
    lines, length, empty = [], 0, True
    while line := file.readline(1 << 20):
        if empty and line.startswith(b"From ") and lines:
            yield b"".join(lines)
            lines, length = [], 0
        elif not (empty and line.startswith(b"From ")) and length < LONGEST:
            lines.append(line)
            length += len(line)
        empty = line in (b"\n", b"\r\n")
    if lines:
        yield b"".join(lines)
