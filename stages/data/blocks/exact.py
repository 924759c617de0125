"""Exact duplicates: of documents equal but for case, white space and compatibility forms, the first stays."""

from hashlib import blake2b

from stages.data.document import Document
from stages.data.text import normalised


def select(documents: list[Document], config: None) -> list[str]:
    """A reason to remove each document, or "". The order of the sources is their priority."""
    seen: dict[bytes, str] = {}
    reasons = []
    for document in documents:
        key = blake2b(normalised(document.text).encode("utf-8", "replace"), digest_size=16).digest()
        first = seen.setdefault(key, document.id)
        reasons.append("" if first == document.id else f"same text: {first}")
    return reasons
