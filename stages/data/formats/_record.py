"""A record with fields (JSON, Parquet) as a document."""

from __future__ import annotations

import json
import re

from stages.data.document import Document

TEXT_FIELDS = ("text", "content", "prompt", "question", "messages")
OTHER_FIELDS = ("answer", "language", "domain", "url", "id")
DOMAIN, LANGUAGE = re.compile(r"[a-z][a-z0-9_]*"), re.compile(r"[a-z]{2}")
SURROGATE = re.compile("[\ud800-\udfff]")


def document(name: str, record: object) -> Document:
    """The text is the first of TEXT_FIELDS that has one; `language`, `domain` and the address (`url`, an `id` that is one, else
    the `id`) are taken over."""
    if not isinstance(record, dict):
        return Document(name, str(record)[:1000], fault="record is no object with fields")
    value = next((record[field] for field in TEXT_FIELDS if record.get(field)), None)
    if isinstance(value, list):
        turns = [turn.get("content") for turn in value if isinstance(turn, dict)] + [record.get("answer")]
        value = "\n\n".join(turn for turn in turns if isinstance(turn, str))
    if not isinstance(value, str) or not value.strip():
        typed = next((type(record[field]).__name__ for field in TEXT_FIELDS if record.get(field)), "")
        fault = f"text of a wrong type: {typed}" if typed and not isinstance(value, str) else "record without a text field"
        return Document(name, json.dumps(record, default=str)[:1000], fault=fault)
    fault = "NUL in the text" if "\0" in value else ""
    if not value.isascii() and SURROGATE.search(value):
        fault = "lone surrogate in the text"
    language, domain = str(record.get("language") or ""), str(record.get("domain") or "prose")
    names = [str(one) for one in (record.get("url"), record.get("id")) if isinstance(one, (str, int)) and one != ""]
    found = next((one for one in names if "://" in one), names[-1] if names else "")
    return Document(name, value, domain=domain if DOMAIN.fullmatch(domain) else "prose", fault=fault,
                    language=language if LANGUAGE.fullmatch(language) else "",
                    url=found)
