"""A document on its way through curation."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Document:
    """One text and what is known of it. Blocks may change `text`, `language`, `markup`, `split`, `quality`
    and `repeat`.

    id: `<source>/<file>[#record]`, unique in a corpus. domain: "code", "prose", "names" or a source's own word.
    language: ISO 639-1, "" if unknown. group: documents of one group (cut from the same file) land in the same
    split; "" for a document alone. markup: "html" until the text is extracted. split: "train", "heldout", or
    "benchmark" for a text that is only there to be kept out of the training split, "existing" for one that an earlier
    corpus holds. url: where it was found, or the identifier of a message or record. fault: why it could not be read; such a
    document goes straight to the removed ones.
    quality: the grade that the classifier gave it, "0" for the lowest. repeat: how many times it goes into the training split.
    """

    id: str
    text: str
    domain: str = "prose"
    language: str = ""
    source: str = ""
    group: str = ""
    markup: str = ""
    split: str = ""
    url: str = ""
    fault: str = ""
    quality: str = ""
    repeat: int = 1


FIELDS = [field.name for field in fields(Document)]


def size(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())
