"""Exact duplicates: of documents equal but for case, white space and compatibility forms, the first stays."""

import numpy as np

from stages.data.document import Document
from stages.data.join import Keys, State, equal
from stages.data.text import hash64, normalised

ROW = [("document", np.int64), ("hash", np.uint64)]


def keys(documents: list[Document], config: None) -> np.ndarray:
    """A row a document: 64 bits of the normalised text's BLAKE2b."""
    rows = np.empty(len(documents), ROW)
    rows["document"] = np.arange(len(documents))
    for i, document in enumerate(documents):
        rows["hash"][i] = hash64(normalised(document.text))
    return rows


def join(keys: Keys, config: None, state: State) -> None:
    """`first`: the place of the first equal document. The order of the sources is their priority."""
    first = state.array("first", np.int64, keys.count)
    first[:] = np.arange(keys.count)
    for later, earliest in equal(keys, state.folder):
        first[later] = earliest
    state.array("removed", bool, keys.count)[:] = first != np.arange(keys.count)


def apply(documents: list[Document], places: np.ndarray, config: None, state: State, same: str = "text") -> list[str]:
    """The reason names the document that stays."""
    found = zip(state["first"][places].tolist(), places.tolist(), strict=True)
    return ["" if first == place else f"same {same}: {state.id(first)}" for first, place in found]
