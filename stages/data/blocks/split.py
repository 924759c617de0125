"""Train or held-out, by document: a hash of the content decides, so a document keeps its side as the corpus grows."""

from dataclasses import dataclass
from hashlib import sha256
from zlib import crc32

import numpy as np

from stages.data.document import Document
from stages.data.join import Keys, State
from stages.data.text import normalised
from stages.stage import ConfigError, option

ROW = [("document", np.int64), ("hash", np.uint64), ("domain", np.uint32)]


@dataclass
class Config:
    heldout: float = option(0.01, "share of the documents held out, by domain")
    seed: int = option(0, "another seed, another choice")


def check(config: Config) -> None:
    """Raises ConfigError for a share that leaves nothing on one side."""
    if not 0 <= config.heldout < 1:
        raise ConfigError(f"options.split.heldout: {config.heldout} is no share below 1; try 0.01")


def keys(documents: list[Document], config: Config) -> np.ndarray:
    """A row a document without a side: 64 bits of the group's hash (of the content, where it has none), and the domain's."""
    chosen = [(i, document) for i, document in enumerate(documents) if not document.split]
    rows = np.empty(len(chosen), ROW)
    for row, (i, document) in enumerate(chosen):
        key = f"{document.source}/{document.group}" if document.group else normalised(document.text)
        digest = sha256(f"{config.seed}:{key}".encode("utf-8", "replace")).digest()
        rows[row] = i, int.from_bytes(digest[:8], "big"), crc32(document.domain.encode())
    return rows


def join(keys: Keys, config: Config, state: State) -> None:
    """`heldout`: whether each document is; a share of the hashes. A domain of two groups or more always has one."""
    limit = int(config.heldout * 2**64)
    least: dict[int, set[int]] = {}  # the two smallest hashes of each domain
    for rows in keys.parts():
        for domain in np.unique(rows["domain"]).tolist():
            found = np.unique(rows["hash"][rows["domain"] == domain])[:2].tolist()
            least[domain] = set(sorted(least.get(domain, set()) | set(found))[:2])
    forced = [min(hashes) for hashes in least.values() if len(hashes) > 1 and config.heldout > 0]
    heldout = state.array("heldout", bool, keys.count)
    for rows in keys.parts():
        heldout[rows["document"]] = (rows["hash"] < limit) | np.isin(rows["hash"], np.array(forced, np.uint64))


def apply(documents: list[Document], places: np.ndarray, config: Config, state: State) -> list[str]:
    """Sets `split` in place and removes nothing."""
    for document, heldout in zip(documents, state["heldout"][places].tolist(), strict=True):
        if not document.split:
            document.split = "heldout" if heldout else "train"
    return [""] * len(documents)
