"""Lines that many documents share: menus, footers, cookie notices, templates. They go from every document.

A line counts once a document, however often it stands there, without case, marks, digits and white space.
"""

import re
from dataclasses import dataclass

import numpy as np

from stages.data.document import Document
from stages.data.join import Keys, State, in_order
from stages.data.text import hash64
from stages.stage import ConfigError, option

ROW = [("document", np.int64), ("hash", np.uint64)]
PLAIN = re.compile(r"[\W\d_]+")


@dataclass
class Config:
    min_documents: int = option(10, "documents that a line must stand in to go")
    min_characters: int = option(10, "shorter lines (without marks, digits, spaces) are left alone")


def check(config: Config) -> None:
    """Raises ConfigError where every line would go."""
    if config.min_documents < 2:
        raise ConfigError(f"options.lines.min_documents: {config.min_documents} would remove every line; give 2 or more")


def _hashes(document: Document, config: Config) -> list[int]:
    """A hash a line, never 0; 0 for a line that is left alone; code and names have none."""
    if document.domain in ("code", "names"):
        return []
    plain = (PLAIN.sub("", line).lower() for line in document.text.split("\n"))
    return [hash64(line) >> 1 | 1 if len(line) >= config.min_characters else 0 for line in plain]


def keys(documents: list[Document], config: Config) -> np.ndarray:
    """A row a document and different line."""
    found = [sorted(set(_hashes(document, config)) - {0}) for document in documents]
    rows = np.empty(sum(map(len, found)), ROW)
    rows["document"] = np.repeat(np.arange(len(found)), [len(hashes) for hashes in found])
    rows["hash"] = [value for hashes in found for value in hashes]
    return rows


def join(keys: Keys, config: Config, state: State) -> None:
    """`shared`: the hashes of lines in documents enough, in order."""
    found = []
    for rows in in_order(keys, state.folder):
        values, counts = np.unique_counts(rows["hash"])
        found.append(np.sort(values[counts >= config.min_documents]))
    shared = np.concatenate([*found, np.empty(0, np.uint64)])
    state.array("shared", np.uint64, len(shared))[:] = shared


def apply(documents: list[Document], places: np.ndarray, config: Config, state: State) -> list[str]:
    """Drops the lines in place; a reason to remove a document of which nothing is left."""
    shared = state["shared"]
    for document in documents if len(shared) else []:
        hashes = np.array(_hashes(document, config), np.uint64)
        if len(hashes):
            gone = shared[np.minimum(np.searchsorted(shared, hashes), len(shared) - 1)] == hashes
            if gone.any():
                lines = document.text.split("\n")
                document.text = "\n".join(line for line, drop in zip(lines, gone.tolist(), strict=True) if not drop)
    return ["" if document.text.strip() else "nothing but shared lines" for document in documents]
