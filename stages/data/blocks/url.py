"""Documents of one address: the first stays. A bare identifier is none: other files number their records alike.

Addresses are equal but for the scheme, `www.`, a final slash, the fragment and parameters that only track.
"""

import re
from hashlib import blake2b

import numpy as np

from stages.data.blocks import exact
from stages.data.document import Document
from stages.data.join import Keys, State

TRACKING = re.compile(r"(?<=[?&])(utm_\w+|fbclid|gclid|ref|session_?id)=[^&]*&?")


def keys(documents: list[Document], config: None) -> np.ndarray:
    """A row a document that has an address."""
    places = [i for i, document in enumerate(documents) if "://" in document.url]
    rows = np.empty(len(places), exact.ROW)
    for row, i in enumerate(places):
        digest = blake2b(normal(documents[i].url).encode("utf-8", "replace"), digest_size=8).digest()
        rows[row] = i, int.from_bytes(digest)
    return rows


def normal(url: str) -> str:
    """The address without what makes no difference."""
    url = TRACKING.sub("", url.partition("#")[0].strip())
    return re.sub(r"^https?://(www\.)?", "", url.rstrip("?&/"), flags=re.IGNORECASE)


def join(keys: Keys, config: None, state: State) -> None:
    """As for equal texts."""
    exact.join(keys, config, state)


def apply(documents: list[Document], places: np.ndarray, config: None, state: State) -> list[str]:
    """The reason names the document that stays."""
    return [reason.replace("same text", "same url") for reason in exact.apply(documents, places, config, state)]
