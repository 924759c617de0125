"""Decontamination: training documents that share word n-grams with held-out or benchmark documents are removed."""

from dataclasses import dataclass

import numpy as np

from stages.data.document import Document
from stages.data.text import ngrams
from stages.stage import ConfigError, option


@dataclass
class Config:
    ngram: int = option(13, "words (characters in Chinese, Japanese, Thai) that must agree in a row")
    overlap: float = option(0.2, "share of n-grams, of the training or of the protected document, that may be shared")


def check(config: Config) -> None:
    """Raises ConfigError for an n-gram without words."""
    if config.ngram < 1:
        raise ConfigError(f"options.decontaminate.ngram: {config.ngram} is below 1; 13 is usual")


def select(documents: list[Document], config: Config) -> list[str]:
    """A reason to remove each training document, or "". Protected is every document of another split than "train".

    A protected text shorter than one n-gram protects nothing.
    """
    protected = [document for document in documents if document.split != "train"]
    grams = [ngrams(document.text, config.ngram) for document in protected]
    owners = np.repeat(np.arange(len(grams)), [len(gram) for gram in grams])
    hashes = np.concatenate([*grams, np.empty(0, np.uint64)])
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    sizes = np.array([max(len(gram), 1) for gram in grams])

    def reason(document: Document) -> str:
        own = ngrams(document.text, config.ngram)
        left, right = np.searchsorted(hashes, own, "left"), np.searchsorted(hashes, own, "right")
        hits = [owners[a:b] for a, b in zip(left, right, strict=True) if b > a]
        if not hits:
            return ""
        shares = np.bincount(np.concatenate(hits), minlength=len(sizes)) / sizes
        worst = int(shares.argmax())
        share = max(float(shares[worst]), len(hits) / len(own))
        found = f"overlap with {protected[worst].split}: {protected[worst].id} ({share:.0%})"
        return found if share > config.overlap else ""

    return [reason(document) if document.split == "train" and len(hashes) else "" for document in documents]
