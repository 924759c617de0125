"""Joins over keys on disk: rows with equal hashes across all shards, and connected components, in bounded memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROWS = 4_000_000  # rows of keys sorted at once
LEADING = 24  # bits


class Keys:
    """The rows that a block gathered, over all shards; rows of documents that are gone are left out.

    paths, counts: files and documents of the shards. benchmark: shards whose documents always stay.
    alive, protected: bool [documents], shared by the joins of one pass.
    """

    def __init__(self, paths: list[Path], counts: list[int], benchmark: list[bool], name: str = ""):
        self.paths, self.counts, self.name = paths, counts, name
        self.count = sum(counts)
        self.alive = np.ones(self.count, bool)
        self.protected = np.repeat(benchmark, counts) if counts else np.zeros(0, bool)

    def of(self, name: str) -> Keys:
        """The same documents, the rows of block `name`."""
        self.name = name
        return self

    def parts(self) -> Iterator[np.ndarray]:
        """Structured rows, at most ROWS at a time, `document` counted over the corpus, in its order."""
        offset = 0
        for path, count in zip(self.paths, self.counts, strict=True):
            file = Path(f"{path}.{self.name}.keys")
            if file.exists():
                dtype = np.dtype([tuple(part) for part in json.loads(Path(f"{path}.{self.name}.dtype").read_text())])
                for start in range(0, file.stat().st_size // dtype.itemsize, ROWS):
                    part = np.fromfile(file, dtype, ROWS, offset=start * dtype.itemsize)
                    part["document"] += offset
                    yield part[self.alive[part["document"]]]
            offset += count


class State:
    """What a join leaves for the next pass: named arrays on disk, and the identifiers of the documents joined."""

    def __init__(self, folder: Path, paths: list[Path], counts: list[int]):
        self.folder, self.paths = folder, paths
        self.offsets = np.cumsum([0, *counts])
        self.done = (folder / "done").exists()
        self.arrays: dict[str, np.ndarray] = {}
        folder.mkdir(exist_ok=True)

    def array(self, name: str, dtype: type, count: int) -> np.ndarray:
        """A new array [count] on disk."""
        made = np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", dtype, (count,))
        self.arrays[name] = made
        return made

    def get(self, name: str) -> np.ndarray | None:
        """An array of the join, or None."""
        if name not in self.arrays:
            path = self.folder / f"{name}.npy"
            if not path.exists():
                return None
            self.arrays[name] = np.load(path, mmap_mode="r")
        return self.arrays[name]

    def __getitem__(self, name: str) -> np.ndarray:
        found = self.get(name)
        if found is None:
            raise KeyError(name)
        return found

    def find(self, name: str, values: np.ndarray) -> np.ndarray:
        """int64 [values]: where each stands in an ordered array of uint64, -1 for none. A table of leading bits tells most."""
        ordered, key = self[name], f"{name} by leading bits"
        if key not in self.arrays:
            self.arrays[key] = np.zeros(1 << LEADING, bool)
            for start in range(0, len(ordered), ROWS):
                self.arrays[key][ordered[start : start + ROWS] >> np.uint64(64 - LEADING)] = True
        found = np.full(len(values), -1)
        maybe = np.flatnonzero(self.arrays[key][values >> np.uint64(64 - LEADING)])
        if len(maybe):
            place = np.minimum(np.searchsorted(ordered, values[maybe]), len(ordered) - 1)
            found[maybe] = np.where(ordered[place] == values[maybe], place, -1)
        return found

    def commit(self) -> None:
        for array in self.arrays.values():
            if isinstance(array, np.memmap):
                array.flush()
        self.arrays.clear()
        (self.folder / "done").touch()
        self.done = True

    def id(self, document: int) -> str:
        """The identifier of a document by its place in the corpus."""
        shard = int(np.searchsorted(self.offsets, document, "right")) - 1
        row = document - int(self.offsets[shard])
        with open(f"{self.paths[shard]}.ends", "rb") as ends, open(f"{self.paths[shard]}.ids", "rb") as ids:
            ends.seek(max(row - 1, 0) * 8)
            places = np.fromfile(ends, np.int64, 2 if row else 1)
            start = int(places[0]) if row else 0
            ids.seek(start)
            return ids.read(int(places[-1]) - start).decode()


def in_order(keys: Keys, scratch: Path) -> Iterator[np.ndarray]:
    """All rows by `hash`, then `document`, in parts; equal hashes never lie in two parts.

    More than ROWS are first dealt out to files by their leading bits.
    """
    total = sum(len(part) for part in keys.parts())
    count = -(-total // ROWS)
    if count <= 1:
        parts = list(keys.parts())
        yield _sorted(np.concatenate(parts)) if parts else np.empty(0, [("document", np.int64), ("hash", np.uint64)])
        return
    paths = [scratch / f"part-{i}" for i in range(count)]
    for path in paths:
        path.unlink(missing_ok=True)
    for part in keys.parts():
        dtype, bucket = part.dtype, ((part["hash"] >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)
        order = np.argsort(bucket, kind="stable")
        bounds = np.searchsorted(bucket[order], np.arange(count + 1))
        for i in np.flatnonzero(np.diff(bounds)):
            with open(paths[i], "ab") as file:
                file.write(part[order[bounds[i] : bounds[i + 1]]].tobytes())
    for path in paths:
        if path.exists():
            yield _sorted(np.fromfile(path, dtype))
            os.unlink(path)


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort((rows["document"], rows["hash"]))]


def equal(keys: Keys, scratch: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of documents that share a hash: (later ones, the first of theirs), int64, in parts."""
    for rows in in_order(keys, scratch):
        if len(rows):
            begins = np.concatenate([[True], rows["hash"][1:] != rows["hash"][:-1]])
            first = rows["document"][np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))]
            later = first != rows["document"]
            yield rows["document"][later], first[later]


def connect(parent: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Join the components of a[i] and b[i] in the forest `parent` (int64, in place); the smallest is the root."""
    while len(a):
        low, high = roots(parent, a), roots(parent, b)
        low, high = np.minimum(low, high), np.maximum(low, high)
        apart = low != high
        a, b = high[apart], low[apart]
        np.minimum.at(parent, a, b)


def roots(parent: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The root of each node."""
    found = parent[nodes]
    while True:
        above = parent[found]
        if np.array_equal(above, found):
            parent[nodes] = found  # shorter paths for those who ask next
            return found
        found = above
