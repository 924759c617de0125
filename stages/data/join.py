"""Joins over keys on disk: rows with equal hashes across all shards, and connected components, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROWS = 4_000_000  # rows of keys sorted at once
LEADING = 24  # bits
Each = Callable[[str, str, int], None]  # block, kind, how many


class Keys:
    """The rows that a block gathered, over all shards; rows of documents that are gone are left out.

    paths, counts: files and documents of the shards. benchmark: shards whose documents always stay.
    alive, protected: bool [documents], shared by the joins of one pass. each: does the tasks 0, 1, ... of a kind ("deal",
    "sort") of the shuffle of a block; here, if None.
    """

    def __init__(self, paths: list[Path], counts: list[int], benchmark: list[bool], each: Each | None = None):
        self.paths, self.counts, self.name, self.each = paths, counts, "", each
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
            for part in _parts(path, self.name, offset):
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

    def index(self, name: str) -> None:
        """A table of the leading bits in an ordered array of uint64, which tells `find` most; made once, in the join."""
        ordered, table = self[name], self.array(f"{name}.leading", bool, 1 << LEADING)
        for start in range(0, len(ordered), ROWS):
            table[ordered[start : start + ROWS] >> np.uint64(64 - LEADING)] = True

    def find(self, name: str, values: np.ndarray) -> np.ndarray:
        """int64 [values]: where each stands in an ordered array of uint64 that has an index, -1 for none."""
        ordered = self[name]
        found = np.full(len(values), -1)
        maybe = np.flatnonzero(self[f"{name}.leading"][values >> np.uint64(64 - LEADING)])
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
        for path in self.folder.glob("sorted-*"):  # a killed join reads them again
            path.unlink()
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
    """All rows by `hash`, then `document`, in parts; equal hashes never lie in two parts. More than ROWS are shuffled."""
    counts = [_count(path, keys.name) for path in keys.paths]
    if sum(counts) <= ROWS:
        found = list(keys.parts())
        yield _sorted(np.concatenate(found)) if found else np.empty(0, [("document", np.int64), ("hash", np.uint64)])
        return
    for path in _shuffled(keys, scratch, counts):
        rows = np.load(path)
        yield rows[keys.alive[rows["document"]]]


@dataclass(frozen=True)
class Shuffle:
    """The rows of a block that are more than ROWS are brought in order by tasks: a `deal` parts those of some shards by the
    leading bits of their hashes, a `sort` orders one part of all deals. A task that was done before does nothing.

    folder: of the join. parts: how many. dealt: for each deal, (path, first document) of its shards.
    """

    name: str
    folder: Path
    parts: int
    dealt: list[list[tuple[Path, int]]]

    def deal(self, number: int) -> None:
        done, ends, shards = self.folder / f"dealt-{number}.npy", [], self.dealt[number]
        if done.exists():
            return
        found = (part for path, first in shards for part in _parts(path, self.name, first))
        start = 0
        with open(self.folder / f"rows-{number}", "wb") as file:
            for rows in found if len(shards) == 1 else [np.concatenate(list(found))]:
                part = ((rows["hash"] >> np.uint64(32)) * np.uint64(self.parts) >> np.uint64(32)).astype(np.int64)
                file.write(rows[np.argsort(part, kind="stable")].tobytes())
                ends.append(start + np.cumsum(np.bincount(part, minlength=self.parts)))
                start += len(rows)
        _save(done, np.concatenate([[0], *ends]))

    def sort(self, part: int) -> None:
        done, found = self.folder / f"sorted-{part:05d}.npy", []
        if done.exists():
            return
        for number, shards in enumerate(self.dealt):
            dtype, ends = _dtype(shards[0][0], self.name), np.load(self.folder / f"dealt-{number}.npy")
            for at in range(part, len(ends) - 1, self.parts):
                start, count = int(ends[at]), int(ends[at + 1] - ends[at])
                found.append(np.fromfile(self.folder / f"rows-{number}", dtype, count, offset=start * dtype.itemsize))
        _save(done, _sorted(np.concatenate(found)))


def _shuffled(keys: Keys, folder: Path, counts: list[int]) -> list[Path]:
    """The files of the parts in order. counts: rows of each shard."""
    groups: list[list[tuple[Path, int]]] = [[]]
    room = ROWS
    for path, count, first in zip(keys.paths, counts, np.cumsum([0, *keys.counts]).tolist(), strict=False):
        if count > room and groups[-1]:
            groups.append([])
            room = ROWS
        groups[-1] += [(path, first)] if count else []
        room -= count
    made = Shuffle(keys.name, folder, -(-sum(counts) // ROWS), [group for group in groups if group])
    dealt = [[[str(path), first] for path, first in group] for group in made.dealt]
    (folder / "shuffle.json").write_text(json.dumps([made.name, made.parts, dealt]))
    for kind, count in (("deal", len(made.dealt)), ("sort", made.parts)):
        if keys.each:
            keys.each(keys.name, kind, count)
        else:
            for number in range(count):
                task(folder, kind, number)
    for number in range(len(made.dealt)):
        (folder / f"rows-{number}").unlink(missing_ok=True)
    return [folder / f"sorted-{part:05d}.npy" for part in range(made.parts)]


def task(folder: Path, kind: str, number: int) -> None:
    """One task of the shuffle in `folder`."""
    name, parts, dealt = json.loads((folder / "shuffle.json").read_text())
    made = Shuffle(name, folder, parts, [[(Path(path), first) for path, first in group] for group in dealt])
    getattr(made, kind)(number)


def _save(path: Path, array: np.ndarray) -> None:
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        np.save(file, array)
    part.replace(path)


def _dtype(path: Path, name: str) -> np.dtype:
    return np.dtype([tuple(part) for part in json.loads(Path(f"{path}.{name}.dtype").read_text())])


def _count(path: Path, name: str) -> int:
    file = Path(f"{path}.{name}.keys")
    return file.stat().st_size // _dtype(path, name).itemsize if file.exists() else 0


def _parts(path: Path, name: str, offset: int) -> Iterator[np.ndarray]:
    """A shard's rows, at most ROWS at a time, `document` counted over the corpus."""
    count = _count(path, name)
    for start in range(0, count, ROWS):
        dtype = _dtype(path, name)
        part = np.fromfile(f"{path}.{name}.keys", dtype, ROWS, offset=start * dtype.itemsize)
        part["document"] += offset
        yield part


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
