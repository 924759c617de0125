"""Confidence intervals of scores. Plain arithmetic, closed forms: the same numbers on every machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054  # two-sided 95 %


def wilson(scores: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % Wilson interval of scores in [0, 1] (Wilson 1927). (0, 0, 1) without scores.

    Exact in its assumptions for right/wrong scores. With partial credit it is conservative: of all variables on
    [0, 1] with mean p, right/wrong has the largest variance, p(1-p). Never of zero width, unlike a bootstrap.
    """
    n = len(scores)
    if n == 0:
        return 0.0, 0.0, 1.0
    p = sum(scores) / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(max(p * (1 - p), 0.0) / n + Z * Z / (4 * n * n))
    return p, max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p))


def paired(after: Sequence[float], before: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference after - before of scores in [0, 1] on the same prompts, with its 95 % interval.

    (0, -1, 1) without prompts.

    Pairing removes the variance that the prompts share, so this is narrower than the two models' own intervals.
    Adjusted Wald interval (Bonett and Price 2012): one invented prompt a side, so that equal answers to a few
    prompts are no proof of equal models.
    """
    differences = [a - b for a, b in zip(after, before, strict=True)]
    if not differences:
        return 0.0, -1.0, 1.0
    n = len(differences) + 2
    centre = sum(differences) / n
    half = Z * math.sqrt(max((sum(d * d for d in differences) + 2) / n - centre * centre, 0.0) / n)
    return sum(differences) / len(differences), max(-1.0, centre - half), min(1.0, centre + half)


def wins(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Of each prompt 1 where a's reward is the higher one, 0.5 where they are equal, else 0."""
    return [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in zip(a, b, strict=True)]


def win_rate(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Share of prompts on which a's reward is the higher one, ties counting half, with its 95 % Wilson interval."""
    return wilson(wins(a, b))


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 10_000) -> tuple[float, float, float]:
    """Mean of one value a prompt and its 95 % percentile interval over resampled prompts (Efron and Tibshirani 1993,
    ch. 13). Of differences of two models on the same prompts it is the paired bootstrap. (0, -inf, inf) without values.
    """
    import numpy as np

    if not len(values):
        return 0.0, -math.inf, math.inf
    given, rng = np.asarray(values, np.float64), np.random.default_rng(seed)
    means = np.concatenate([
        given[rng.integers(len(given), size=(min(1000, draws - start), len(given)))].mean(1)
        for start in range(0, draws, 1000)
    ])  # fmt: skip
    low, high = np.quantile(means, [0.025, 0.975])
    return float(given.mean()), float(low), float(high)
