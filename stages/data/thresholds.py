"""What a threshold does: how the scores of its documents spread, and the documents next to it on either side."""

from __future__ import annotations

import math
from typing import Any

from stages.data.document import Document

BINS = 20  # of the histogram, from 0 to 1
NEAREST = 5  # documents shown on each side


class Scored(str):
    """A verdict (a reason to remove the document, or "") with the score in [0, 1] that it came from, and the threshold."""

    def __new__(cls, reason: str, score: float, threshold: float) -> Scored:
        made = super().__new__(cls, reason)
        made.score, made.threshold = float(score), threshold
        return made


Found = dict[str, dict[str, Any]]  # "block:threshold" -> threshold, histogram, and rows (distance, id, score, text) of either side


def see(found: Found, block: str, documents: list[Document], verdicts: list[str]) -> None:
    """Count the scored verdicts of a batch."""
    for document, verdict in zip(documents, verdicts, strict=True):
        if isinstance(verdict, Scored) and math.isfinite(verdict.score):
            row = [abs(verdict.score - verdict.threshold), document.id, round(verdict.score, 4), document.text[:200]]
            side = {"removed" if verdict else "kept": [row]}
            histogram = [0] * BINS
            histogram[max(0, min(int(verdict.score * BINS), BINS - 1))] = 1
            _add(found, f"{block}:{verdict.threshold:g}", {"threshold": verdict.threshold, "histogram": histogram, "kept": [], "removed": [], **side})


def merge(parts: list[Found]) -> list[dict[str, Any]]:
    """All shards as one: a row a block and threshold, its nearest documents as id, score, text, the nearest first."""
    total: Found = {}
    for part in parts:
        for key, one in part.items():
            _add(total, key, one)
    names = ("id", "score", "text")
    return [
        {"block": key.rpartition(":")[0], "threshold": one["threshold"], "histogram": one["histogram"],
         **{side: [dict(zip(names, row[1:], strict=True)) for row in one[side]] for side in ("kept", "removed")}}
        for key, one in total.items()
    ]  # fmt: skip


def _add(found: Found, key: str, one: dict[str, Any]) -> None:
    before = found.setdefault(key, {"threshold": one["threshold"], "histogram": [0] * BINS, "kept": [], "removed": []})
    before["histogram"] = [a + b for a, b in zip(before["histogram"], one["histogram"], strict=True)]
    for side in ("kept", "removed"):
        if one[side] and (len(before[side]) < NEAREST or one[side][0] < before[side][-1]):
            before[side] = sorted(before[side] + one[side])[:NEAREST]
