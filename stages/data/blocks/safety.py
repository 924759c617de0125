"""Safety: documents like those of a seed list go, in the five areas of Command A (arXiv 2504.00698, section 3.3.7).

One classifier an area (see classifier.py), the seeds of the area against a sample of the corpus and against `harmless`
documents, which speak of the same things without harm (news, health advice, law). Seeds are the user's: none are shipped.
A list of domains does the coarse work before this block (domains.py).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.data.blocks import classifier
from stages.data.document import Document
from stages.data.join import Keys, State
from stages.data.source import find
from stages.data.thresholds import at_most
from stages.stage import ConfigError, option, placement, unknown

AREAS = ("violence", "misinformation", "self_harm", "csea", "sexual")


@dataclass
class Config:
    seeds: dict[str, list[str]] = placement({}, "area: files, folders, s3:// prefixes with documents that must not stay")
    harmless: list[str] = placement([], "documents that speak of the same things without harm")
    max_score: float = at_most(0.7, "largest probability, at even odds, of a document that stays")
    sample: float = option(0.01, "share of the corpus that stands for the others; at most 10,000 documents")
    sample_characters: int = option(4000, "characters looked at in each document")
    seed: int = option(0, "decides the sample")

    def learner(self) -> classifier.Config:
        return classifier.Config(sample=self.sample, sample_characters=self.sample_characters, seed=self.seed)


def check(config: Config) -> None:
    """Raises ConfigError without seeds, for an area that is none of the five, or a share out of range."""
    if not config.seeds:
        raise ConfigError(f"options.safety.seeds: is empty; name documents for at least one of {', '.join(AREAS)}")
    for area in config.seeds:
        if area not in AREAS:
            raise ConfigError(f"options.safety.seeds: {unknown(area, list(AREAS))}")
    if not 0 < config.sample <= 1 or not 0 < config.max_score < 1:
        raise ConfigError(f"options.safety: sample {config.sample} and max_score {config.max_score} must lie between 0 and 1")


def external(config: Config) -> dict[str, Any]:
    """The identity of the seeds and the harmless documents."""
    lists = {**config.seeds, "harmless": config.harmless}
    return {area: [source.identity() for source in find(names, field=f"data.options.safety ({area})")] for area, names in lists.items() if names}


def keys(documents: list[Document], config: Config) -> np.ndarray:
    """The features of the documents in the sample."""
    return classifier.keys(documents, config.learner())


def join(keys: Keys, config: Config, state: State) -> None:
    """`weights` [areas, 2^BITS + 1], in the order of the areas' names."""
    learner = config.learner()
    others = [classifier.sampled(keys), classifier.from_sources(config.harmless, learner)]
    weights = [classifier.fit(classifier.from_sources(config.seeds[area], learner), others, f"options.safety.seeds.{area}")
               for area in sorted(config.seeds)]  # fmt: skip
    state.array("weights", np.float64, len(weights) * len(weights[0]))[:] = np.concatenate(weights)


def apply(documents: list[Document], places: np.ndarray, config: Config, state: State) -> list[str]:
    """The reason names the area that scores highest."""
    areas, rows = sorted(config.seeds), classifier.features(documents, config.learner())
    weights = np.asarray(state["weights"]).reshape(len(areas), -1)
    scores = np.stack([classifier.score(rows, one, len(documents)) for one in weights])
    return [f"{areas[best]}: {value:.2f}" if value > config.max_score else ""
            for best, value in zip(scores.argmax(0).tolist(), scores.max(0).tolist(), strict=True)]
