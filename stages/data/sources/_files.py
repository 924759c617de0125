"""Documents out of files: code by extension, HTML, JSON lines, Parquet, everything else as prose. Any of them .gz."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stages.data.document import Document
from stages.stage import CuveeError

CODE = set(
    ".py .pyi .java .c .h .cc .cpp .cxx .hpp .rs .go .js .mjs .jsx .ts .tsx .cob .cbl .sql .rb .php .swift .kt .scala"
    " .cs .sh .bash .pl .lua .r .jl .hs .ml .clj .ex .erl .css .scss .yaml .yml .toml .ini .cmake .proto .vue".split()
)
HTML = {".html", ".htm", ".xhtml"}
LINES = {".jsonl", ".ndjson"}
SKIPPED = {"__pycache__", "node_modules"}
TEXT_FIELDS = ("text", "content", "prompt", "question", "messages")


@dataclass
class Entry:
    """A file of a source. `size` in bytes; `take` of them are read (JSON lines can be cut to fit a limit).

    open: the file as a binary stream. digest: the identity of the bytes taken. always: taken first, whatever the seed
    and the limits; its documents count all the same.
    """

    name: str
    size: int
    open: Callable[[], BinaryIO]
    digest: Callable[[], str]
    take: int = 0
    always: bool = False

    @property
    def kind(self) -> str:
        """The extension that decides, in lower case and without .gz."""
        name = self.name.lower().removesuffix(".gz")
        return os.path.splitext(name)[1]

    @property
    def cuttable(self) -> bool:
        """Whether reading may end in the middle, at a record's border."""
        return self.kind in LINES or self.kind == ".parquet"


def unreadable(path: str | Path, error: OSError) -> CuveeError:
    """The sentence for a file or folder that is there but closed to us."""
    return CuveeError(f"data.sources: {path} cannot be read ({error.strerror}); mend its permissions or leave it "
                      "out of the sources")


def local(path: Path, name: str) -> Entry:
    """The entry of a file on this machine. Raises CuveeError when it cannot be read."""

    def digest() -> str:
        found = hashlib.sha256()
        with entry.open() as file:
            left = entry.take
            while left > 0 and (piece := file.read(min(left, 1 << 20))):
                found.update(piece)
                left -= len(piece)
        return found.hexdigest()

    def opened() -> BinaryIO:
        try:
            return open(path, "rb")
        except OSError as error:
            raise unreadable(path, error) from None

    size = path.stat().st_size
    entry = Entry(name, size, opened, digest, take=size)
    return entry


def entries(source: str, skipped: set[str] = SKIPPED) -> list[Entry]:
    """All files of a file or folder by relative name, without hidden ones, links to folders, `skipped` folders.

    Raises CuveeError for a missing source or a folder that cannot be listed.
    """
    root = Path(source).expanduser()
    if root.is_file():
        return [local(root, root.name)]

    def refuse(error: OSError) -> None:
        raise unreadable(error.filename, error) from None

    found = []
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        paths = (Path(folder, name) for name in files if not name.startswith("."))
        found += [local(path, path.relative_to(root).as_posix()) for path in paths if path.is_file()]
    return sorted(found, key=lambda entry: entry.name)


def documents(files: list[Entry]) -> Iterator[Document]:
    """Every record of every file. What cannot be read comes with its `fault` set."""
    for entry in files:
        try:
            with entry.open() as file:
                yield from _read(entry, file)
        except (gzip.BadGzipFile, EOFError, zlib.error):
            yield Document(entry.name, "", fault="damaged gzip file")


def _read(entry: Entry, file: BinaryIO) -> Iterator[Document]:
    if entry.name.lower().endswith(".gz"):
        file = gzip.open(file)
    if entry.kind in LINES:
        yield from _lines(entry, file)
    elif entry.kind == ".parquet":
        yield from _parquet(entry, file)
    else:
        yield _whole(entry, file)


def _whole(entry: Entry, file: BinaryIO) -> Document:
    head = file.read(8192)
    if b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Document(entry.name, "", fault=f"binary file: {entry.kind or 'no extension'}")
    html = entry.kind in HTML
    text = decode(head + file.read(), html)
    return Document(entry.name, text, domain="code" if entry.kind in CODE else "prose", markup="html" if html else "")


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


def _lines(entry: Entry, file: BinaryIO) -> Iterator[Document]:
    whole, read = entry.take >= entry.size or entry.name.lower().endswith(".gz"), 0
    for number, line in enumerate(file, 1):
        read += len(line)
        if not whole and read > entry.take:
            return
        if line.strip():
            name = f"{entry.name}#{number}"
            try:
                record = json.loads(line)
            except ValueError:  # covers UnicodeDecodeError
                yield Document(name, line.decode("utf-8", "replace"), fault="record is not JSON")
            else:
                yield _record(name, record)


def _parquet(entry: Entry, file: BinaryIO) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        wanted = [name for name in table.schema_arrow.names if name in (*TEXT_FIELDS, "answer", "language", "domain")]
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                yield _record(f"{entry.name}#{number}", record)
    except pyarrow.ArrowException as error:
        yield Document(entry.name, "", fault=f"damaged Parquet file: {str(error).splitlines()[0][:80]}")


def _record(name: str, record: object) -> Document:
    """A JSON or Parquet record: its text is the first of TEXT_FIELDS it has; `language` and `domain` are taken over."""
    if not isinstance(record, dict):
        return Document(name, str(record), fault="record is no object with fields")
    value = next((record[field] for field in TEXT_FIELDS if record.get(field)), None)
    if isinstance(value, list):
        turns = [turn.get("content") for turn in value if isinstance(turn, dict)] + [record.get("answer")]
        value = "\n\n".join(turn for turn in turns if isinstance(turn, str))
    if not isinstance(value, str) or not value.strip():
        return Document(name, json.dumps(record, default=str)[:1000], fault="record without a text field")
    language, domain = str(record.get("language") or ""), str(record.get("domain") or "prose")
    return Document(name, value, domain=domain if re.fullmatch(r"[a-z][a-z0-9_]*", domain) else "prose",
                    language=language if re.fullmatch(r"[a-z]{2}", language) else "")
