"""Documents of one address, and records of a file with one identifier: the first stays.

Addresses are equal but for the scheme, the case of the host, `www.`, a final slash, the fragment and parameters that only
track. A message's or a web archive's identifier (<...>) is one wherever it stands; others number the records of their file.
"""

import re

import numpy as np

from stages.data.blocks import exact
from stages.data.document import Document
from stages.data.join import Keys, State
from stages.data.text import hash64

ADDRESS = re.compile(r"https?://(?:www\.)?([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
TRACKING = re.compile(r"(?<=[?&])(utm_\w+|fbclid|gclid|ref|session_?id)=[^&]*&?")


def keys(documents: list[Document], config: None) -> np.ndarray:
    """A row a document that has an address or an identifier."""
    places = [i for i, document in enumerate(documents) if document.url]
    rows = np.empty(len(places), exact.ROW)
    for row, i in enumerate(places):
        rows[row] = i, hash64(_name(documents[i]))
    return rows


def _name(document: Document) -> str:
    if "://" in document.url or document.url.startswith("<"):
        return normal(document.url)
    return f"{document.id.rpartition('#')[0] or document.id}\0{document.url}"


def normal(url: str) -> str:
    """The address without what makes no difference."""
    url = TRACKING.sub("", url.partition("#")[0].strip()).rstrip("?&/")
    found = ADDRESS.fullmatch(url)
    return found[1].lower() + found[2] if found else url


def join(keys: Keys, config: None, state: State) -> None:
    """As for equal texts."""
    exact.join(keys, config, state)


def apply(documents: list[Document], places: np.ndarray, config: None, state: State) -> list[str]:
    """The reason names the document that stays."""
    found = exact.apply(documents, places, config, state, "url")
    return [reason if "://" in document.url else reason.replace("same url", "same id", 1) for reason, document in zip(found, documents, strict=True)]
