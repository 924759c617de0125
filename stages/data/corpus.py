"""Reading artifacts of data: a CORPUS document by document, PROMPTS line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def documents(path: Path, split: str) -> Iterator[dict[str, str]]:
    """Documents of a split ("train", "heldout", "removed") in order: id, text, domain, language, source, url; of removed ones block and reason."""
    import pyarrow.parquet

    for file in sorted(path.glob(f"{split}-*.parquet")):
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            yield from batch.to_pylist()


def prompts(path: Path, split: str) -> Iterator[dict[str, Any]]:
    """Prompts of a split ("train", "heldout"): id, domain, messages, answer, check."""
    with open(path / f"{split}.jsonl", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
