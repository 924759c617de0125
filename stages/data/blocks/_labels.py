"""Documents with a score, as an LLM judge or a person gave it: JSON lines or Parquet with `text` and `score`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from stages.data.document import Document
from stages.data.formats import parquet
from stages.data.source import Source, find
from stages.stage import ConfigError, CuveeError


def sources(names: list[str]) -> list[Source]:
    """The files that hold labels: JSON lines and Parquet; of a folder that is a corpus, the training split."""
    found = find(names, field="data.options.classifier.labels")
    for source in found:
        rows = [entry for entry in source.entries if entry.kind in (".jsonl", ".parquet")]
        source.entries = [entry for entry in rows if entry.name.startswith("train-")] or rows
    return found


def read(names: list[str]) -> Iterator[tuple[Document, float]]:
    """Every document with its score. Raises CuveeError for a record without text or without a number as score."""
    for source in sources(names):
        for entry in source.entries:
            for number, row in enumerate(_rows(entry), 1):
                if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not isinstance(row.get("score"), (int, float)):
                    raise CuveeError(f"options.classifier.labels: record {number} of {source.label}/{entry.name} has no text with a number "
                                     "as score; write {\"text\": ..., \"score\": 3}")
                yield Document(f"{source.label}/{entry.name}#{number}", row["text"]), float(row["score"])


def _rows(entry: Any) -> Iterator[Any]:
    if entry.compressed:
        raise ConfigError(f"options.classifier.labels: {entry.name} is compressed; unpack it")
    if entry.kind == ".parquet":
        with entry.seekable() as file:
            yield from parquet.rows(file)
        return
    with entry.open() as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError:
                    yield None
