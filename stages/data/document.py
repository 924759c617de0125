"""A document on its way through curation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Document:
    """One text and what is known of it. Blocks may change `text`, `language`, `markup` and `split`.

    id: `<source>/<file>[#record]`, unique in a corpus. domain: "code", "prose", "names" or a source's own word.
    language: ISO 639-1, "" if unknown. group: documents of one group (cut from the same file) land in the same
    split; "" for a document alone. markup: "html" until the text is extracted. split: "train", "heldout", or
    "benchmark" for a text that is only there to be kept out of the training split. fault: why it could not be
    read; such a document goes straight to the removed ones.
    """

    id: str
    text: str
    domain: str = "prose"
    language: str = ""
    source: str = ""
    group: str = ""
    markup: str = ""
    split: str = ""
    fault: str = ""
