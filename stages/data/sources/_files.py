"""Files on this machine as a source; what they hold is read by the format that claims their extension."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from stages.data.document import Document
from stages.data.formats import text
from stages.stage import CuveeError, names, resolve

SKIPPED = {"__pycache__", "node_modules"}
LARGE = 1 << 20  # bytes from which on a digest is remembered: every plan asks for those of all files


def _zstd(file: BinaryIO) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"))


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


@dataclass
class Entry:
    """A file of a source. `size` in bytes; `take` of them are read (JSON lines can be cut to fit a limit).

    path: where it lies. always: taken first, whatever the seed and the limits; its documents count all the same.
    start, stop: the records that begin in these bytes; stop = 0 for all. PARTS: whether its stream can begin there.
    """

    PARTS = True

    name: str
    size: int
    path: str
    take: int = 0
    always: bool = False
    start: int = 0
    stop: int = 0

    @property
    def length(self) -> int:
        """Bytes that are read."""
        return (self.stop or self.take) - self.start

    @property
    def ending(self) -> str:
        return os.path.splitext(self.name.lower())[1]

    @property
    def compressed(self) -> bool:
        return self.ending in COMPRESSED

    @property
    def kind(self) -> str:
        """The extension that decides, in lower case, without that of a compression."""
        name = self.name.lower()
        return os.path.splitext(os.path.splitext(name)[0] if self.compressed else name)[1]

    @property
    def cuttable(self) -> bool:
        """Whether reading may end in the middle, at a record's border."""
        return self.kind in (".jsonl", ".ndjson", ".parquet")

    def open(self) -> BinaryIO:
        """The file as a binary stream. Raises CuveeError when it cannot be read."""
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise unreadable(self.path, error) from None

    def seekable(self) -> BinaryIO:
        """The same, for a reader that jumps."""
        return self.open()

    def digest(self) -> str:
        """The identity of the bytes taken: their SHA-256, which for a large file is remembered as long as the file's place, size
        and times stay."""
        kept = _remembered(self.path, self.take) if self.take >= LARGE else None
        if kept and kept.exists():
            return kept.read_text()
        found = hashlib.sha256()
        with self.open() as file:
            left = self.take
            while left > 0 and (piece := file.read(min(left, 1 << 20))):
                found.update(piece)
                left -= len(piece)
        if kept:
            kept.parent.mkdir(exist_ok=True)
            part = kept.with_suffix(f".{os.getpid()}")
            part.write_text(found.hexdigest())
            part.replace(kept)
        return found.hexdigest()


def _remembered(path: str, take: int) -> Path | None:
    """Where the digest of a file is kept; None without a state directory, or for a file so new that its times may lie."""
    state, stat = Path(os.environ.get("CUVEE_STATE", ".cuvee")), os.stat(path)
    if not os.access(state, os.W_OK) or time.time() - stat.st_mtime < 5:
        return None
    seen = (os.path.abspath(path), take, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    return state / "digests" / hashlib.sha256(repr(seen).encode("utf-8", "surrogateescape")).hexdigest()


def unreadable(path: str | Path, error: OSError) -> CuveeError:
    """The sentence for a file or folder that is there but closed to us."""
    return CuveeError(f"data.sources: {path} cannot be read ({error.strerror}); mend its permissions or its disk, or leave it "
                      "out of the sources")


def local(path: Path, name: str) -> Entry:
    """The entry of a file on this machine."""
    size = path.stat().st_size
    return Entry(name, size, str(path), take=size)


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


@cache
def _formats() -> dict[str, Any]:
    """Extension -> the module of stages/data/formats that reads it."""
    modules = [resolve("data/formats", name) for name in names("data/formats")]
    return {suffix: module for module in modules for suffix in module.SUFFIXES}


def documents(files: list[Entry]) -> Iterator[Document]:
    """Every record of every file. What cannot be read comes with its `fault` set."""
    for entry in files:
        module = _formats().get(entry.kind, text)
        try:
            with entry.seekable() if getattr(module, "SEEKS", False) else entry.open() as file:
                unpack = entry.compressed and not getattr(module, "UNPACKS", False)
                yield from module.read(entry, COMPRESSED[entry.ending](file) if unpack else file)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if getattr(error, "errno", None):  # the disk, not the record
                raise unreadable(entry.path, error) from error
            if not entry.compressed:
                raise
            yield Document(entry.name, "", fault=f"damaged {entry.ending[1:]} file")
