"""How good a reward model is: accuracy, calibration and margins on held-out pairs, and what optimising it brings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

BINS = 10  # of the reliability diagram, between 0.5 and 1
EDGES = np.linspace(-4.0, 4.0, 17)  # of the histogram of margins, in nats; what lies outside counts in the outer bins


def quality(domains: list[str], margins: list[float]) -> dict[str, Any]:
    """Of pairs with margins r_w - r_l (nats): the share ordered rightly, over all and by domain, and the calibration.

    The model's confidence in its own order is sigmoid(|margin|). `reliability` holds for each bin of confidence how often
    that order was right; `ece` is the expected calibration error, sum over bins of n/N |accuracy - confidence|
    (Guo et al., arXiv 1706.04599, eq. 3).
    """
    values, names = np.array(margins), np.array(domains)
    right, confidence = values > 0, 1 / (1 + np.exp(-np.abs(values)))
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = []
    for i in range(BINS):
        mine = place == i
        if mine.any():
            bins.append({"low": 0.5 + i / (2 * BINS), "n": int(mine.sum()), "confidence": float(confidence[mine].mean()),
                         "accuracy": float(right[mine].mean())})  # fmt: skip
    return {
        "pairs": len(values),
        "accuracy": float(right.mean()),
        "domains": {d: float(right[names == d].mean()) for d in sorted(set(domains))},
        "margin": float(values.mean()),
        "ece": sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(values),
        "reliability": bins,
        "margins": {
            "edges": EDGES.tolist(),
            "counts": np.histogram(values.clip(EDGES[0], EDGES[-1]), EDGES)[0].tolist(),
        },
    }


def optimised(proxy: list[list[float]], gold: list[list[float]]) -> list[dict[str, float]]:
    """Best of n by `proxy` (the reward model), n = 1, 2, 4, ... completions a prompt: its mean proxy and gold reward.

    proxy, gold: of each prompt its k completions. For each n the mean over all subsets of n of the k, exactly; proxy in
    standard deviations of its prompt's completions. kl = log n - (n - 1)/n nats, the divergence of best-of-n from the
    policy (Stiennon et al., arXiv 2009.01325, appendix G.3); where gold falls while proxy rises the reward model is
    over-optimised (Gao et al., arXiv 2210.10760).
    """
    k = min(map(len, proxy))
    found = []
    for n in (2**i for i in range(k.bit_length())):
        weights = np.array([math.comb(i, n - 1) / math.comb(k, n) for i in range(k)])  # of the i-th worst to be the best
        best: dict[str, list[float]] = {"proxy": [], "gold": []}
        for scores, truth in zip(proxy, gold, strict=True):
            p, g = np.array(scores[:k]), np.array(truth[:k])
            order = np.argsort(p, kind="stable")
            spread = p.std() or 1.0
            best["proxy"].append(float(weights @ ((p - p.mean()) / spread)[order]))
            best["gold"].append(float(weights @ g[order]))
        found.append({"n": n, "kl": math.log(n) - (n - 1) / n, **{name: float(np.mean(v)) for name, v in best.items()}})
    return found


def elo(raters: list[list[float]]) -> list[float]:
    """Elo of a prompt's completions from raters (each a score of every completion): the Bradley-Terry maximum likelihood
    of all their comparisons, ties as half a win, Elo = 400/ln 10 * theta, mean 0.

    Every two completions get one invented tie, so that who always wins has a finite Elo.
    """
    scores = np.array(raters)
    k = scores.shape[1]
    wins = np.full((k, k), 0.5)
    for row in scores:
        wins += (row[:, None] > row[None, :]) + 0.5 * (row[:, None] == row[None, :])
    np.fill_diagonal(wins, 0.0)
    games, strength = wins + wins.T, np.ones(k)
    for _ in range(500):  # Zermelo's algorithm; converges for any connected graph
        strength = wins.sum(1) / (games / (strength[:, None] + strength[None, :])).sum(1)
        strength /= np.exp(np.log(strength).mean())
    return (400 / math.log(10) * np.log(strength)).tolist()
