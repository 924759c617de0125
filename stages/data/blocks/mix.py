"""The mixture: how much of each source, language, domain or grade of quality goes into the training split, by weights or temperature.

The size of the mix is what the scarcest part allows: no document is used more than `max_epochs` times. Parts that are
larger than their share lose documents by a hash of the text; those that are smaller are repeated.
"""

from dataclasses import dataclass

import numpy as np

from stages.data.document import Document, size
from stages.data.join import Keys, State
from stages.data.text import hash64
from stages.stage import ConfigError, option

ROW = [("document", np.int64), ("part", np.uint64), ("bytes", np.int64), ("copies", np.int64)]


@dataclass
class Config:
    by: str = option("source", "what the parts are", choices=("source", "language", "domain", "quality"))
    weights: dict[str, float] = option({}, "share of each part, e.g. {web: 3, books: 1}, none for others; empty: temperature")
    temperature: float = option(1.0, "without weights: shares ~ bytes^(1/temperature); 1 = as found, large = even")
    max_epochs: float = option(4.0, "most times that a document is used")
    min_characters: int = option(0, "shorter documents stay out: a set of long ones for a cooldown")
    bytes: int = option(0, "size of the training split; 0 = all that the weights and epochs allow")


def check(config: Config) -> None:
    """Raises ConfigError for weights, temperatures or epochs that no mix can have."""
    if config.weights and (min(config.weights.values()) < 0 or not sum(config.weights.values())):
        raise ConfigError(f"options.mix.weights: {config.weights} must be shares of 0 or more, one of them above")
    if config.temperature <= 0 or config.max_epochs <= 0 or config.bytes < 0:
        raise ConfigError(f"options.mix: temperature {config.temperature} and max_epochs {config.max_epochs} must be "
                          f"above 0, bytes {config.bytes} not below")


AFTER_APPLY = True  # only what goes into training counts


def keys(documents: list[Document], config: Config) -> np.ndarray:
    """A row a training document: its part, size and copies."""
    found = [(i, hash64(getattr(document, config.by)), size(document.text) * document.repeat, document.repeat)
             for i, document in enumerate(documents) if document.split in ("", "train") and len(document.text) >= config.min_characters]
    return np.array(found, ROW)


def join(keys: Keys, config: Config, state: State) -> None:
    """`parts` (hashes, in order) and `epochs` of each."""
    volume, copies = {}, {}
    for rows in keys.parts():
        parts, inverse = np.unique(rows["part"], return_inverse=True)
        for part, count in zip(parts.tolist(), np.bincount(inverse, rows["bytes"]).tolist(), strict=True):
            volume[part] = volume.get(part, 0) + int(count)
            copies[part] = max(copies.get(part, 1), int(rows["copies"][rows["part"] == part].max()))
    found = epochs(volume, copies, {hash64(name): weight for name, weight in config.weights.items()}, config)
    state.array("parts", np.uint64, len(found))[:] = sorted(found)
    state.array("epochs", np.float64, len(found))[:] = [found[part] for part in sorted(found)]


def epochs(volume: dict[int, int], copies: dict[int, int], weights: dict[int, float], config: Config) -> dict[int, float]:
    """How many times each part is used, from its bytes (copies counted), the most copies of a document and the weights."""
    if not any(volume.values()):
        return dict.fromkeys(volume, 0.0)  # the sentence for it is the curation's
    if not weights:
        largest = max(volume.values())  # powers of shares: those of bytes would overflow
        weights = {part: (count / largest) ** (1 / config.temperature) for part, count in volume.items()}
    if missing := len({part for part, weight in weights.items() if weight and not volume.get(part)}):
        raise ConfigError(f"options.mix.weights: {missing} of {sorted(config.weights)} name no {config.by} of the corpus "
                          "that has text left; leave them out")
    total = sum(weights.values())
    most = min(config.max_epochs / copies[part] * volume[part] * total / weight for part, weight in weights.items() if weight)
    if config.bytes > most:
        raise ConfigError(f"options.mix.bytes: {config.bytes} need more than max_epochs={config.max_epochs:g} of a part; "
                          f"at most {int(most)} can be mixed with these weights")
    # Without a size: no more than there is, so that nothing is repeated for the sake of the largest part alone.
    wanted = config.bytes or min(most, sum(volume[part] for part, weight in weights.items() if weight))
    return {part: wanted * weights.get(part, 0.0) / total / count if count else 0.0 for part, count in volume.items()}


def apply(documents: list[Document], places: np.ndarray, config: Config, state: State) -> list[str]:
    """Sets `repeat` in place; a reason to remove each document that the mix has no room for."""
    shares = dict(zip(state["parts"].tolist(), state["epochs"].tolist(), strict=True))
    reasons = [""] * len(documents)
    for i, document in enumerate(documents):
        if document.split not in ("", "train"):
            continue
        if len(document.text) < config.min_characters:
            reasons[i] = f"mix: shorter than {config.min_characters} characters"
            continue
        times = shares.get(hash64(getattr(document, config.by)), 0.0) * document.repeat
        draw = hash64(f"{document.id}\n{document.text[:1000]}") / 2**64
        document.repeat = int(times) + (draw < times - int(times))
        reasons[i] = "" if document.repeat else f"mix: more than the share of {getattr(document, config.by) or 'unknown'}"
    return reasons
