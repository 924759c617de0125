"""JSON lines: a record a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from stages.data.document import Document
from stages.data.formats._record import document

SUFFIXES = {".jsonl", ".ndjson"}
LONGEST = 32 << 20  # bytes of a line: one that does not fit in memory must not end the run


def read(entry, file: BinaryIO) -> Iterator[Document]:
    """Every line. With `entry.stop`, the lines that begin in [start, stop); with a limit, those that end within it."""
    whole, number, place = entry.take >= entry.size or entry.compressed, 0, 0
    if entry.start:
        file.seek(entry.start - 1)
        place = entry.start - 1 + sum(len(rest) for rest in _rest(file))
    for line, skipped in _lines(file):
        begin, number = place, number + 1
        place += len(line) + skipped
        if entry.stop and begin >= entry.stop or not whole and place > entry.take:
            return
        name = f"{entry.name}#{number}" if not entry.stop else f"{entry.name}#byte{begin}"
        if skipped:
            yield Document(name, line[:1000].decode("utf-8", "replace"), fault=f"line too long: {len(line) + skipped} bytes")
        elif line.strip():
            yield _record(name, line)


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(line, bytes of it that were passed over)."""
    while line := file.readline(LONGEST):
        yield line, 0 if len(line) < LONGEST or line.endswith(b"\n") else sum(map(len, _rest(file)))


def _rest(file: BinaryIO) -> Iterator[bytes]:
    """What is left of a line."""
    while piece := file.readline(1 << 20):
        yield piece
        if piece.endswith(b"\n"):
            return


def _record(name: str, line: bytes) -> Document:
    try:
        return document(name, json.loads(line))
    except UnicodeDecodeError:
        fault = "record is not UTF-8"
    except ValueError:
        fault = "record is not JSON"
    except RecursionError:
        fault = "record is nested too deep"
    return Document(name, line[:1000].decode("utf-8", "replace"), fault=fault)
