"""Decontamination: training documents that share word n-grams with held-out or benchmark documents are removed."""

from dataclasses import dataclass

import numpy as np

from stages.data.document import Document
from stages.data.join import Keys, State, in_order
from stages.data.thresholds import at_most
from stages.data.words import ngrams
from stages.stage import ConfigError, option

AFTER_APPLY = True  # who is protected is known once the split is applied
ROW = [("document", np.int64), ("hash", np.uint64), ("benchmark", bool)]


@dataclass
class Config:
    ngram: int = option(13, "words (characters in Chinese, Japanese, Thai) that must agree in a row")
    overlap: float = at_most(0.2, "share of n-grams, of the training or of the protected document, that may be shared")


def check(config: Config) -> None:
    """Raises ConfigError for an n-gram without words."""
    if config.ngram < 1:
        raise ConfigError(f"options.decontaminate.ngram: {config.ngram} is below 1; 13 is usual")


def keys(documents: list[Document], config: Config) -> np.ndarray:
    """The n-grams of held-out and benchmark documents. One shorter than an n-gram protects nothing."""
    protected = [i for i, document in enumerate(documents) if document.split in ("heldout", "benchmark")]
    parts = []
    for hashes, text in ngrams([documents[i].text for i in protected], config.ngram):
        rows = np.empty(len(hashes), ROW)
        rows["document"], rows["hash"] = np.array(protected)[text], hashes
        rows["benchmark"] = np.array([document.split == "benchmark" for document in documents])[rows["document"]]
        parts.append(rows)
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, ROW)


def join(keys: Keys, config: Config, state: State) -> None:
    """`hashes` in order, `owners`, the places of their documents; `sizes`, the n-grams of each protected document."""
    total = sum(len(rows) for rows in keys.parts())
    hashes, owners = state.array("hashes", np.uint64, total), state.array("owners", np.int64, total)
    sizes, benchmark = state.array("sizes", np.int32, keys.count), state.array("benchmark", bool, keys.count)
    start = 0
    for rows in in_order(keys, state.folder):
        hashes[start : start + len(rows)], owners[start : start + len(rows)] = rows["hash"], rows["document"]
        np.add.at(sizes, rows["document"], 1)
        if len(rows):
            benchmark[rows["document"]] = rows["benchmark"]
        start += len(rows)
    state.index("hashes")


def apply(documents: list[Document], places: np.ndarray, config: Config, state: State) -> list[str]:
    """A reason to remove each training document that shares too much with a protected one."""
    reasons = [""] * len(documents)
    hashes, training = state["hashes"], [i for i, document in enumerate(documents) if document.split == "train"]
    if not len(hashes):
        return reasons
    for grams, text in ngrams([documents[i].text for i in training], config.ngram):
        for i in np.unique(text[state.find("hashes", grams) >= 0]).tolist():
            reasons[training[i]] = reasons[training[i]] or _reason(np.unique(grams[text == i]), hashes, state, config)
    return reasons


def _reason(own: np.ndarray, hashes: np.ndarray, state: State, config: Config) -> str:
    left, right = np.searchsorted(hashes, own, "left"), np.searchsorted(hashes, own, "right")
    hits = [state["owners"][a:b] for a, b in zip(left, right, strict=True) if b > a]
    owners, counts = np.unique(np.concatenate(hits), return_counts=True)
    shares = counts / state["sizes"][owners]
    worst = int(shares.argmax())
    share = max(float(shares[worst]), len(hits) / len(own))
    if share <= config.overlap:
        return ""
    split = "benchmark" if state["benchmark"][owners[worst]] else "heldout"
    return f"overlap with {split}: {state.id(int(owners[worst]))} ({share:.0%})"
