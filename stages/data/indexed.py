"""Megatron's indexed token files, with numpy alone: `<prefix>.bin` holds the tokens, `<prefix>.idx` where they lie.

.idx, little endian: b"MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 sequences S, uint64 D = documents + 1,
int32[S] lengths (tokens), int64[S] offsets into .bin (bytes), int64[D] first sequence of each document, closed by S.
Cuvee writes one sequence a document. The bytes equal those of `megatron.core.datasets.indexed_dataset`.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


class IndexedTokens:
    """A memory-mapped file of token documents.

    lengths: int32 [documents], in tokens. `tokens` is the flat memory map [lengths.sum()] in the stored dtype and
    `offsets` int64 [documents] the first token of each document in it.
    Raises FileNotFoundError without the files, ValueError for a file in another format or cut short.
    """

    def __init__(self, prefix: str | Path):
        index = Path(f"{prefix}.idx").read_bytes()
        if len(index) < HEADER.size or not index.startswith(MAGIC):
            raise ValueError(f"{prefix}.idx is no Megatron index: it should start with {MAGIC!r}")
        _, version, code, count, documents = HEADER.unpack_from(index)
        if version != 1 or code not in CODES or len(index) < HEADER.size + 12 * count + 8 * documents:
            raise ValueError(f"{prefix}.idx is damaged: version {version}, dtype code {code}, {len(index)} bytes")
        dtype = np.dtype(CODES[code])
        self.lengths = np.frombuffer(index, np.int32, count, HEADER.size)
        self.offsets = np.frombuffer(index, np.int64, count, HEADER.size + 4 * count) // dtype.itemsize
        total, size = int(self.lengths.sum(dtype=np.int64)), Path(f"{prefix}.bin").stat().st_size
        if size != total * dtype.itemsize:
            raise ValueError(f"{prefix}.bin holds {size} bytes, its index speaks of {total * dtype.itemsize}")
        self.tokens = np.memmap(f"{prefix}.bin", dtype, mode="r") if total else np.empty(0, dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i: a read-only view [lengths[i]] in the stored dtype, uint16 or int32."""
        start = self.offsets[i]
        return self.tokens[start : start + self.lengths[i]]


class Writer:
    """Writes `<prefix>.bin` document by document and, with `close`, `.idx`; a sequence a document.

    The dtype is Megatron's choice: uint16 below 65,500 tokens of vocabulary, otherwise int32.
    """

    def __init__(self, prefix: str | Path, vocab_size: int):
        self.prefix, self.dtype = prefix, np.dtype(np.uint16 if vocab_size < 65500 else np.int32)
        self.lengths: list[int] = []
        self.file = open(f"{prefix}.bin", "wb")

    def add(self, document: np.ndarray | list[int]) -> None:
        array = np.asarray(document, self.dtype)
        self.file.write(array.tobytes())
        self.lengths.append(len(array))

    def close(self) -> tuple[int, int]:
        """The counts (documents, tokens)."""
        self.file.close()
        _index(self.prefix, np.array(self.lengths, np.int32), self.dtype)
        return len(self.lengths), sum(self.lengths)


def write(prefix: str | Path, documents: Iterable[np.ndarray | list[int]], vocab_size: int) -> tuple[int, int]:
    """Write all documents; the counts (documents, tokens)."""
    writer = Writer(prefix, vocab_size)
    for document in documents:
        writer.add(document)
    return writer.close()


def merge(prefix: str | Path, parts: Iterable[str | Path]) -> tuple[int, int]:
    """Write the documents of several files, in their order, as one; the counts (documents, tokens)."""
    lengths = []
    with open(f"{prefix}.bin", "wb") as file:
        for part in parts:
            found = IndexedTokens(part)
            lengths.append(found.lengths)
            with open(f"{part}.bin", "rb") as piece:
                shutil.copyfileobj(piece, file, 1 << 20)
    joined = np.concatenate(lengths)
    _index(prefix, joined, found.tokens.dtype)
    return len(joined), int(joined.sum(dtype=np.int64))


def _index(prefix: str | Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    count = len(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[:count] * dtype.itemsize
    code = next(code for code, kind in CODES.items() if kind == dtype)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
        file.write(lengths.astype(np.int32).tobytes() + offsets.astype(np.int64).tobytes())
        file.write(np.arange(count + 1, dtype=np.int64).tobytes())
