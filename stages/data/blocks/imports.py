"""Repositories as long documents: the files of each one after the other, what a file imports before it.

Command A trains on repositories linearised along the import graph (arXiv 2504.00698, section 2.1). Files follow a walk of
the graph in the order of their names that visits what a file asks for first and breaks cycles where it meets them; each
begins with a comment that names it. Imports of Python, JavaScript, TypeScript and C are read; other code stands by name.
The text goes into the first file's document; those of the others are removed, for "linearised". Documents that are no
file of their own (records of JSON lines) stay as they are.
"""

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from stages.data.blocks import _imports, licence
from stages.data.document import Document
from stages.data.join import Keys, State, in_order
from stages.data.shard import read
from stages.data.text import hash64
from stages.stage import ConfigError, option

IS, ASKS = 0, 1
ROW = [("document", np.int64), ("hash", np.uint64), ("kind", np.uint8), ("repository", np.uint64), ("bytes", np.int64)]


@dataclass
class Config:
    depth: int = option(1, "folders at the beginning of a path that name a repository; 0 = a source is one")
    max_bytes: int = option(1_000_000, "longest document; a repository that is longer makes several")


def check(config: Config) -> None:
    """Raises ConfigError for a depth below 0 or documents of no length."""
    if config.depth < 0 or config.max_bytes < 1:
        raise ConfigError(f"options.imports: depth {config.depth} must be 0 or more, max_bytes {config.max_bytes} above 0")


def _place(document: Document, depth: int) -> tuple[str, str]:
    """(repository, path of the file in it); ("", "") for a document that is no file of code."""
    if document.domain != "code" or "#" in document.id or document.split in ("benchmark", "existing"):
        return "", ""
    parts = document.id.split("/")
    depth = min(depth, len(parts) - 2)
    return "/".join(parts[: depth + 1]), "/".join(parts[depth + 1 :])


def _shown(document: Document, path: str) -> bytes:
    """The file as it stands in the long document."""
    ending = posixpath.splitext(path)[1].lower()
    mark = next((mark for mark, endings in licence.MARKS.items() if ending in endings.split()), "")
    head = f"{mark} {path}\n" if mark else ""
    return f"{head}{document.text.strip(chr(10))}\n\n".encode()


def keys(documents: list[Document], config: Config) -> np.ndarray:
    """A row for each name of a file, and for each name it asks for."""
    rows = []
    for i, document in enumerate(documents):
        repository, path = _place(document, config.depth)
        if path:
            size, own = len(_shown(document, path)), hash64(repository)
            found = [(name, IS) for name in sorted({path, *_imports.names(path)})]
            found += [(name, ASKS) for name in sorted(_imports.asked(path, document.text))]
            rows += [(i, hash64(f"{repository}\0{name}"), kind, own, size) for name, kind in found]
    return np.array(rows, ROW)


def join(keys: Keys, config: Config, state: State) -> None:
    """`carrier` of each document (-1: itself as it is), `start` and `size` of a carrier's text in `texts`; `removed`."""
    size, repository = np.zeros(keys.count, np.int64), np.zeros(keys.count, np.uint64)
    for rows in keys.parts():
        size[rows["document"]], repository[rows["document"]] = rows["bytes"], rows["repository"]
    files = np.flatnonzero(size)
    order = _order(files, repository, _edges(keys, state))
    carrier, start = state.array("carrier", np.int64, keys.count), np.zeros(keys.count, np.int64)
    carrier[:] = -1
    room, before, end = 0, None, 0
    for file in order.tolist():
        if repository[file] != before or size[file] > room:
            first, before, room = file, repository[file], config.max_bytes
        carrier[file], start[file] = first, end
        end, room = end + int(size[file]), room - int(size[file])
    counts = np.bincount(carrier[files], minlength=keys.count)
    carrier[np.flatnonzero((counts == 1) & (carrier == np.arange(keys.count)))] = -1  # a file alone stays as it is
    state.array("start", np.int64, keys.count)[:] = start
    state.array("size", np.int64, keys.count)[:] = np.bincount(carrier[carrier >= 0], size[carrier >= 0], keys.count).astype(np.int64)
    state.array("removed", bool, keys.count)[:] = (carrier >= 0) & (carrier != np.arange(keys.count))
    _write(config, state, end)


def _edges(keys: Keys, state: State) -> tuple[np.ndarray, np.ndarray]:
    """(files, files that they ask for), by file, then by what is asked for, int64."""
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    for rows in in_order(keys, state.folder) if any(len(part) for part in keys.parts()) else []:
        own, asks = rows[rows["kind"] == IS], rows[rows["kind"] == ASKS]
        left, right = np.searchsorted(own["hash"], asks["hash"], "left"), np.searchsorted(own["hash"], asks["hash"], "right")
        counts = right - left
        at = np.repeat(left, counts) + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        parts.append((np.repeat(asks["document"], counts), own["document"][at]))
    files, asked = (np.concatenate(one) for one in zip(*parts, strict=True))
    order = np.lexsort((asked, files))
    return files[order], asked[order]


def _order(files: np.ndarray, repository: np.ndarray, edges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The files, repository after repository, each after what it asks for; int64."""
    found = np.fromiter(_walk(files, *edges), np.int64, len(files))
    _, first, inverse = np.unique(repository[found], return_index=True, return_inverse=True)
    return found[np.argsort(first[inverse], kind="stable")]


def _walk(files: np.ndarray, users: np.ndarray, asked: np.ndarray) -> Iterator[int]:
    """A depth-first walk: a file comes when all it asks for has come or is under way."""
    seen: set[int] = set()
    for root in files.tolist():
        stack = [] if root in seen else [(root, iter(()), False)]
        while stack:
            file, rest, open_ = stack.pop()
            if not open_:
                if file in seen:
                    continue
                seen.add(file)
                a, b = np.searchsorted(users, (file, file + 1))
                rest = iter(asked[a:b].tolist())
            for one in rest:
                if one not in seen:
                    stack += [(file, rest, True), (one, iter(()), False)]
                    break
            else:
                yield file


def _write(config: Config, state: State, end: int) -> None:
    """`texts` uint8: every file's at its place, in one reading of the shards."""
    texts, carrier, start = state.array("texts", np.uint8, max(end, 1)), state["carrier"], state["start"]
    for place, one in enumerate(chain.from_iterable(map(read, state.paths))):
        if carrier[place] >= 0:
            shown = _shown(one, _place(one, config.depth)[1])
            texts[start[place] : start[place] + len(shown)] = np.frombuffer(shown, np.uint8)


def apply(documents: list[Document], places: np.ndarray, config: Config, state: State) -> list[str]:
    """Puts the files together in place; a reason to remove those that went into another's document."""
    reasons = [""] * len(documents)
    for i, (place, carrier) in enumerate(zip(places.tolist(), state["carrier"][places].tolist(), strict=True)):
        if carrier == place:
            begin, size = int(state["start"][place]), int(state["size"][place])
            documents[i].text = state["texts"][begin : begin + size].tobytes().decode().rstrip("\n") + "\n"
        elif carrier >= 0:
            reasons[i] = f"linearised: into {state.id(carrier)}"
    return reasons
