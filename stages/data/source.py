"""Sources of raw documents: a built-in name, a file or folder, or an s3:// or hf:// prefix; sampled, limited and identified.

A built-in source is a file of stages/data/sources with `entries(source) -> list[Entry]` (files with sizes and
digests) and `documents(entries) -> Iterator[Document]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import import_module
from itertools import chain, count
from pathlib import Path
from types import ModuleType

from stages.data.document import Document, size
from stages.data.sources._files import Entry, unreadable
from stages.data.sources._git import is_repository
from stages.stage import ConfigError, CuveeError, names, resolve, unknown

SHARD = 64 << 20  # bytes of files: also the most that is done twice after a crash


@dataclass
class Source:
    """The files taken of one source, in order. `label` names it in the corpus, free of paths."""

    label: str
    module: ModuleType
    entries: list[Entry]
    max_bytes: int
    max_documents: int

    def identity(self) -> dict[str, str | int]:
        """Label, number and bytes of the files taken, and one SHA-256 over their names and digests."""
        found = sha256()
        for entry in self.entries:
            found.update(f"{entry.name}\0{entry.digest()}\n".encode("utf-8", "surrogateescape"))
        taken = sum(entry.take for entry in self.entries)
        return {"label": self.label, "files": len(self.entries), "bytes": taken, "sha256": found.hexdigest()}

    def shards(self, split: str) -> list[Shard]:
        """What workers read one by one: files up to SHARD bytes, or a part of a larger one; in order.

        A limit counts over the whole source, and a built-in source is small: either is one shard.
        """
        name = self.module.__name__
        if self.max_bytes or self.max_documents or not name.endswith(("._files", "._s3", "._hf", "._git")):
            return [Shard(self.label, name, self.entries, split, self.max_bytes, self.max_documents)]
        groups: list[list[Entry]] = [[]]
        room = SHARD
        for piece in (piece for entry in self.entries for piece in _pieces(entry)):
            if groups[-1] and piece.length > room:
                groups.append([])
                room = SHARD
            groups[-1].append(piece)
            room -= piece.length
        return [Shard(self.label, name, group, split) for group in groups if group]


@dataclass
class Shard:
    """A part of a source: picklable, so that any process can read it. `split` is "", "benchmark" or "existing"."""

    label: str
    module: str
    entries: list[Entry]
    split: str = ""
    max_bytes: int = 0
    max_documents: int = 0

    def documents(self) -> Iterator[Document]:
        """The documents within the limits, with `source`, `split` and a full `id`."""
        count, volume = 0, 0
        for document in import_module(self.module).documents(self.entries):
            document.text = writable(document.text)
            length = size(document.text)
            if self.max_documents and count >= self.max_documents:
                return
            if self.max_bytes and count and volume + length > self.max_bytes:
                return
            count, volume = count + 1, volume + length
            document.source, document.split = self.label, self.split
            document.id, document.url = writable(f"{self.label}/{document.id}"), writable(document.url)
            yield document


def writable(text: str) -> str:
    """The text with "?" for lone surrogates, which no file could hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _pieces(entry: Entry) -> Iterator[Entry]:
    """A file of plain JSON lines in parts of SHARD bytes, any other whole."""
    if entry.size <= SHARD or entry.compressed or entry.kind not in (".jsonl", ".ndjson") or not entry.PARTS:
        yield entry
        return
    for start in range(0, entry.size, SHARD):
        yield replace(entry, start=start, stop=min(start + SHARD, entry.size))


def find(chosen: list[str], seed: int = 0, max_bytes: int = 0, max_documents: int = 0, field: str = "data.sources") -> list[Source]:
    """The sources that a field names, sampled and limited. Raises ConfigError for a missing one, CuveeError for an empty one."""
    found: list[Source] = []
    for source in chosen:
        module, label = _module(source, field)
        entries = module.entries(source)
        if not any(entry.size for entry in entries):
            raise CuveeError(f"{field}: {source!r} holds no file with content; give a folder with documents")
        taken = _sample(entries, seed, max_bytes, max_documents)
        if not taken:
            smallest = min(entry.size for entry in entries)
            raise CuveeError(f"data.source_bytes: {max_bytes} bytes are too few for any file of {source!r}; "
                             f"its smallest has {smallest}, so raise the limit")
        taken_labels = {other.label for other in found}
        free = (name for name in chain([label], (f"{label}-{n}" for n in count(2))) if name not in taken_labels)
        found.append(Source(next(free), module, taken, max_bytes, max_documents))
    return found


def _module(source: str, field: str) -> tuple[ModuleType, str]:
    """How to read a source, and the name it has in the corpus."""
    if source in names("data/sources"):
        return resolve("data/sources", source), source
    if source.startswith(("s3://", "hf://")):
        return import_module(f"stages.data.sources._{source[:2]}"), source.rstrip("/").rsplit("/", 1)[-1].partition("@")[0]
    path = Path(source).expanduser()
    try:
        exists = path.exists()
    except OSError as error:  # a folder above it is closed to us
        raise unreadable(path, error) from None
    if not exists:
        known = unknown(source, names("data/sources"))
        raise ConfigError(f"{field}: {known}, an existing file or folder, or an s3:// or hf:// prefix")
    kind = "_git" if is_repository(path) else "_files"
    return import_module(f"stages.data.sources.{kind}"), path.resolve().name or "root"


def _sample(entries: list[Entry], seed: int, max_bytes: int, max_documents: int) -> list[Entry]:
    """All files by name; with a limit, files in the seed's order, and one that does not fit is cut or passed over."""

    def place(entry: Entry) -> tuple[bool, bytes]:
        return not entry.always, sha256(f"{seed}:{entry.name}".encode("utf-8", "replace")).digest()

    taken, left = [], max_bytes
    for entry in sorted(entries, key=place) if max_bytes or max_documents else entries:
        if not entry.size or max_documents and len(taken) >= max_documents and not entry.always:
            continue
        if not max_bytes or entry.always or entry.size <= left:
            taken.append(entry)
        elif entry.cuttable and left > 0:
            # Only plain JSON lines can be read in part; of the others the documents are cut, see Shard.documents.
            entry.take = entry.size if entry.kind == ".parquet" or entry.compressed else left
            taken.append(entry)
        else:
            continue
        left -= 0 if entry.always else min(entry.size, left)
    return taken
