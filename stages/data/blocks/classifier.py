"""A quality classifier trained on the spot: documents like the user's good ones, against the corpus' own mean; or documents
that a judge gave a good score (data.judge), against those that it did not.

Logistic regression over hashed words and word pairs (log counts, unit length), as FastText's supervised mode does with
n-grams. Good documents come from `good` (files, folders, s3://), the others are a sample of the corpus; where there are
`labels`, both come from them. The score is the
probability at even odds: `min_score` removes what is below, `upsample` repeats what is above ("educational" documents).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.data.blocks._labels import read, sources
from stages.data.document import Document
from stages.data.join import Keys, State
from stages.data.source import find
from stages.data.text import hash64
from stages.data.thresholds import at_least
from stages.data.words import cut, spans
from stages.stage import ConfigError, option, placement

BITS = 18  # of a feature
ROW = [("document", np.int64), ("feature", np.int32), ("value", np.float32), ("draw", np.uint64)]
LARGEST = 10_000  # documents of a sample: what fits in memory, whatever the corpus
STEPS, RATE, MOMENTUM, DECAY, MIN_DOCUMENTS = 200, 2.0, 0.9, 1e-4, 3


@dataclass
class Config:
    good: list[str] = placement([], "files, folders, s3:// prefixes with documents as they should be")
    labels: list[str] = placement([], "instead: JSON lines or Parquet with text and score, e.g. the artifact of data.judge")
    min_label: float = option(3.0, "smallest score of a labelled document that is good")
    sample: float = option(0.01, "share of the corpus that stands for the others; at most 10,000 documents")
    sample_characters: int = option(4000, "characters looked at in each document")
    min_score: float = at_least(0.1, "smallest score of a document that stays; 0 = all stay")
    upsample: list[Any] = option([], "[smallest score, copies in the training split], e.g. [[0.9, 3]]")
    grades: list[float] = option([], "scores from which on a document has grade 1, 2, ..., which mix.by=quality weighs")
    seed: int = option(0, "decides the sample")


def check(config: Config) -> None:
    """Raises ConfigError for shares out of range or scores that are no numbers."""
    if not 0 < config.sample <= 1 or not 0 <= config.min_score < 1:
        raise ConfigError(f"options.classifier: sample {config.sample} and min_score {config.min_score} must lie "
                          "between 0 and 1")
    for step in config.upsample:
        if not isinstance(step, list) or len(step) != 2 or not 0 <= step[0] <= 1 or step[1] < 1:
            raise ConfigError(f"options.classifier.upsample: {step} is no score from 0 to 1 with copies; try [[0.9, 3]]")


def external(config: Config) -> list[dict[str, Any]]:
    """The identity of the good documents and the labels."""
    return [source.identity() for source in find(config.good, field="data.options.classifier.good") + sources(config.labels)]


def features(documents: list[Document], config: Config) -> np.ndarray:
    """Rows (document, feature, value); each document's values have length 1."""
    parts = [np.empty(0, ROW)]
    texts = [document.text[: config.sample_characters] for document in documents]
    for words, texts_of_words, places in cut(texts):
        text = np.repeat(np.arange(len(words.text_lengths)), np.diff(words.first))
        pairs = np.flatnonzero(text[1:] == text[:-1])
        hashes = np.concatenate([words.hashes, spans(words.sums, pairs, pairs + 2) * np.uint64(0x9E3779B97F4A7C15)])
        owner = np.full(len(words.text_lengths), -1)
        owner[texts_of_words] = places
        document = owner[np.concatenate([text, text[pairs]])]
        combined = (document.astype(np.int64) << BITS) | (hashes >> np.uint64(64 - BITS)).astype(np.int64)
        values, counts = np.unique(combined[document >= 0], return_counts=True)
        rows = np.empty(len(values), ROW)
        rows["document"], rows["feature"], rows["value"] = values >> BITS, values & ((1 << BITS) - 1), np.log1p(counts)
        rows["draw"] = 0
        norms = np.bincount(rows["document"], rows["value"].astype(np.float64) ** 2, minlength=len(documents)) ** 0.5
        rows["value"] /= norms[rows["document"]]
        parts.append(rows)
    return np.concatenate(parts)


def keys(documents: list[Document], config: Config) -> np.ndarray:
    """The features of the documents in the sample."""
    if config.labels:
        return np.empty(0, ROW)
    draws = [(i, hash64(f"{config.seed}:{document.id}")) for i, document in enumerate(documents) if not document.split]
    chosen = [(i, value) for i, value in draws if value < config.sample * 2**64]
    rows = features([documents[i] for i, _ in chosen], config)
    if chosen:
        rows["draw"] = np.array([value for _, value in chosen], np.uint64)[rows["document"]]
        rows["document"] = np.array([i for i, _ in chosen], np.int64)[rows["document"]]
    return rows


def sampled(keys: Keys) -> np.ndarray:
    """The rows of the LARGEST documents with the smallest draws, numbered from 0."""
    draws = np.empty(0, np.uint64)
    for rows in keys.parts():
        draws = np.unique(np.concatenate([draws, rows["draw"]]))[:LARGEST]
    last = draws[-1] if len(draws) else 0
    found = np.concatenate([np.empty(0, ROW), *(rows[rows["draw"] <= last] for rows in keys.parts())])
    _, found["document"] = np.unique(found["document"], return_inverse=True)
    return found


def join(keys: Keys, config: Config, state: State) -> None:
    """`weights` [2^BITS + 1]: of the features, then the constant."""
    if config.labels:
        good, bad = [], []
        for document, value in read(config.labels):
            (good if value >= config.min_label else bad).append(document)
        found = fit(_rows(good, config), [_rows(bad, config)], f"options.classifier.labels with min_label={config.min_label:g}")
    else:
        found = fit(from_sources(config.good, config), [sampled(keys)], "options.classifier.good")
    state.array("weights", np.float64, len(found))[:] = found


def fit(good: np.ndarray, others: list[np.ndarray], where: str) -> np.ndarray:
    """Weights that tell the documents of `good` from the others, each numbered from 0. Raises ConfigError without any."""
    parts, counts = [good, *others], [int(rows["document"].max(initial=-1)) + 1 for rows in (good, *others)]
    if not counts[0] or not sum(counts[1:]):
        raise ConfigError(f"{where}: {counts[0]} documents against {sum(counts[1:])} others are too few to learn from; give more of "
                          "them, or a larger sample")
    rows = np.concatenate(parts)  # a copy: `others` serve the next fit as well
    rows["document"] += np.repeat(np.cumsum(counts) - counts, [len(part) for part in parts])
    return train(rows, np.arange(sum(counts)) < counts[0])


def from_sources(names: list[str], config: Config) -> np.ndarray:
    """The features of all documents of some sources."""
    shards = [shard for source in find(names) for shard in source.shards("")]
    return _rows([document for shard in shards for document in shard.documents() if not document.fault], config)


def _rows(documents: list[Document], config: Config) -> np.ndarray:
    """The features of many documents."""
    parts = [np.empty(0, ROW)]
    for start in range(0, len(documents), 1024):
        parts.append(features(documents[start : start + 1024], config))
        parts[-1]["document"] += start
    return np.concatenate(parts)


def train(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights float64 of a logistic regression with the two classes weighed alike: gradient descent with momentum.

    Features of fewer than MIN_DOCUMENTS are left out: they would tell each document of the sample from the others.
    """
    frequent = np.append(np.bincount(rows["feature"], minlength=1 << BITS) >= MIN_DOCUMENTS, True)
    weights, speed = np.zeros((1 << BITS) + 1), np.zeros((1 << BITS) + 1)
    balance = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
    for _ in range(STEPS):
        error = (labels - score(rows, weights, len(labels))) * balance
        gradient = np.bincount(rows["feature"], rows["value"] * error[rows["document"]], minlength=1 << BITS)
        gradient = np.append(gradient, error.sum())
        speed = MOMENTUM * speed + frequent * gradient - DECAY * weights
        weights += RATE * speed
    return weights


def score(rows: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """float64 [count]: the probability that each document is one of the good."""
    sums = np.bincount(rows["document"], rows["value"] * weights[rows["feature"]], minlength=count) + weights[-1]
    return 1 / (1 + np.exp(-sums))


def apply(documents: list[Document], places: np.ndarray, config: Config, state: State) -> list[str]:
    """Sets `repeat` and `quality` in place; a reason to remove each document, or ""."""
    scores = score(features(documents, config), np.asarray(state["weights"]), len(documents)).tolist()
    reasons = []
    for document, value in zip(documents, scores, strict=True):
        reasons.append(f"quality: {value:.2f}" if value < config.min_score else "")
        document.quality = str(sum(value >= least for least in config.grades)) if config.grades else ""
        document.repeat = max([int(copies) for least, copies in config.upsample if value >= least], default=document.repeat)
    return reasons
