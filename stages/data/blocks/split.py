"""Train or held-out, by document: a hash of the content decides, so a document keeps its side as the corpus grows."""

from dataclasses import dataclass
from hashlib import sha256

from stages.data.document import Document
from stages.data.text import normalised
from stages.stage import ConfigError, option


@dataclass
class Config:
    heldout: float = option(0.01, "share of the documents held out, by domain")
    seed: int = option(0, "another seed, another choice")


def check(config: Config) -> None:
    """Raises ConfigError for a share that leaves nothing on one side."""
    if not 0 <= config.heldout < 1:
        raise ConfigError(f"options.split.heldout: {config.heldout} is no share below 1; try 0.01")


def select(documents: list[Document], config: Config) -> list[str]:
    """Sets `split` in place and removes nothing. A domain of two groups or more always has one held out."""
    groups: dict[str, dict[str, float]] = {}
    keys = []
    for document in documents:
        key = document.group and f"{document.source}/{document.group}" or normalised(document.text)
        digest = sha256(f"{config.seed}:{key}".encode("utf-8", "replace")).digest()
        keys.append(key)
        groups.setdefault(document.domain, {})[key] = int.from_bytes(digest[:8], "big") / 2**64
    heldout = {key for values in groups.values() for key, value in values.items() if value < config.heldout}
    for values in groups.values():
        if len(values) > 1 and config.heldout > 0 and not heldout & values.keys():
            heldout.add(min(values, key=lambda key: (values[key], key)))
    for document, key in zip(documents, keys, strict=True):
        if not document.split:
            document.split = "heldout" if key in heldout else "train"
    return [""] * len(documents)
