"""What a block's thresholds do: a sample of the documents is judged again with each of them a little looser and stricter.

The verdicts are the block's own, on the documents as they came to it. The sample is drawn by a hash of the identifier: a
SHARE of the corpus, or LEAST bytes of a smaller one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from stages.data.document import Document
from stages.data.text import hash64
from stages.stage import option

SHARE, LEAST = 0.01, 1 << 20
MOVES = (0.1, 0.25)  # of the threshold; of a share above a half, of what it lacks to 1
SHOWN = 3  # documents of each side of a threshold
Judge = Callable[[list[Document], np.ndarray, Any], list[str]]  # documents, places, options -> a reason or "" each
Row = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """A document of the sample as it came to a block, its place there and the verdict."""

    document: Document
    place: int
    reason: str


def at_least(default: float, help: str) -> Any:
    """An option of a block that removes what is below it."""
    return field(default=default, metadata={**option(default, help).metadata, "stricter": 1})


def at_most(default: float, help: str) -> Any:
    """An option of a block that removes what is above it."""
    return field(default=default, metadata={**option(default, help).metadata, "stricter": -1})


def share(size: int) -> float:
    """The share of a corpus of `size` bytes that is in the sample."""
    return min(1.0, max(SHARE, LEAST / max(size, 1)))


def drawn(document: Document, share: float) -> bool:
    """Whether a document is in the sample: the same for every block and in every process."""
    return share >= 1 or hash64(document.id) < share * 2**64


def thresholds(options: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Option -> (looser values, stricter values), the nearest first. A threshold of 0 removes nothing and has none."""
    found = {}
    for one in fields(options) if options is not None else []:
        value, stricter = getattr(options, one.name), one.metadata.get("stricter")
        if stricter and value > 0:
            found[one.name] = (list(_moved(value, -stricter)), list(_moved(value, stricter)))
    return found


def _moved(value: float, sign: int) -> Iterator[float]:
    for move in MOVES:
        if isinstance(value, int):
            yield max(0, value + sign * max(round(move * value), 1 + MOVES.index(move)))
        else:
            yield float(f"{value + sign * move * (min(value, 1 - value) if value < 1 else value):.4g}")


def look(block: str, options: Any, judge: Judge, sample: list[Seen]) -> list[Row]:
    """A row a threshold: block, option, threshold, `documents` of the sample; `removed`, [value, how many go at it] by value;
    `nearest`, documents whose verdict turns at a value: value, id, reason, text.
    """
    found, gone = thresholds(options), sum(bool(one.reason) for one in sample)
    rows = {name: {"block": block, "option": name, "threshold": getattr(options, name), "documents": len(sample),
                   "removed": [[getattr(options, name), gone]], "nearest": []} for name in found}  # fmt: skip
    for side in (0, 1) if found else ():
        # Whom one threshold turns, all of them together turn as well: few documents are left to be judged for each.
        outermost = {name: values[side][-1] for name, values in found.items()}
        turned = list(_turned((one for one in sample if bool(one.reason) != bool(side)), judge, replace(options, **outermost)))
        for name, values in found.items():
            left, row = turned, rows[name]
            for value in reversed(values[side]):
                left = list(_turned((one for one, _ in left), judge, replace(options, **{name: value})))
                row["removed"].append([value, gone + (len(left) if side else -len(left))])
                row["nearest"] += [[value, one.document.id, reason, one.document.text[:200]] for one, reason in left[:SHOWN]]
    return list(rows.values())


def merge(rows: Iterable[Row]) -> list[Row]:
    """The rows of all shards as one each, by value; the nearest documents of either side first, SHOWN of each, once each."""
    total: dict[tuple[str, str], Row] = {}
    for row in rows:
        one = total.setdefault((row["block"], row["option"]), {**row, "documents": 0, "removed": [], "nearest": []})
        one["documents"] += row["documents"]
        before = one["removed"] or [[value, 0] for value, _ in row["removed"]]
        one["removed"] = [[value, a + b] for (value, a), (_, b) in zip(before, row["removed"], strict=True)]
        one["nearest"] += row["nearest"]
    for row in total.values():
        row["removed"].sort()
        near: dict[str, dict[str, Any]] = {}
        for one in sorted(row["nearest"], key=lambda one: abs(one[0] - row["threshold"])):
            near.setdefault(one[1], dict(zip(("value", "id", "reason", "text"), one, strict=True)))
        sides = [[one for one in near.values() if (one["value"] < row["threshold"]) == below] for below in (True, False)]
        row["nearest"] = [one for side in sides for one in side[:SHOWN]]
    return list(total.values())


def _turned(sample: Iterable[Seen], judge: Judge, options: Any) -> Iterator[tuple[Seen, str]]:
    """Those whose verdict is another one with these options, and the reason that they go or would go for."""
    sample = list(sample)
    places = np.array([one.place for one in sample], np.int64)
    reasons = judge([replace(one.document) for one in sample], places, options) if sample else []
    for one, reason in zip(sample, reasons, strict=True):
        if bool(reason) != bool(one.reason):
            yield one, reason or one.reason
