"""The objectives' formulas with their default options once more, loop by loop in float64, as the papers write them.

A group is [{"logp": [...], "ref": [...], "old": [...], "score": r, **fields}, ...], a list of nats a target token.
"""

import math

import numpy as np


def ratio(s, key="ref"):
    return float(np.sum(np.array(s["logp"]) - np.array(s[key])))


def softplus(x):
    return math.log1p(math.exp(-x))  # -log sigmoid


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def mean(function):
    return lambda groups: float(np.mean([function(g) for g in groups]))


def ppo(rho, advantage, low, high):
    return -min(rho * advantage, min(max(rho, 1 - low), 1 + high) * advantage)


def ce(groups):
    return -float(np.mean([x for (s,) in groups for x in s["logp"]]))


def distill(groups):
    """2 tokens of the teacher, then the place's own, in turn."""
    terms = []
    for (s,) in groups:
        for i in range(0, len(s["logp"]), 3):
            q = np.exp(s["old"][i : i + 2]) / np.exp(s["old"][i : i + 2]).sum()
            kl = sum(p * (math.log(p) - s["logp"][i + j]) for j, p in enumerate(q))
            terms.append(0.9 * kl - 0.1 * s["logp"][i + 2])
    return float(np.mean(terms))


def bradley_terry(g):
    z = g[0]["score"] - g[1]["score"] - g[0]["margin"]
    return g[0]["label"] * softplus(z) + (1 - g[0]["label"]) * softplus(-z)


def dpo(g):
    return softplus(0.1 * (ratio(g[0]) - ratio(g[1])))


def ipo(g):
    return (ratio(g[0]) / len(g[0]["logp"]) - ratio(g[1]) / len(g[1]["logp"]) - 5) ** 2


def slic(g):
    return max(0.0, 1 - sum(g[0]["logp"]) + sum(g[1]["logp"])) - 0.1 * sum(g[0]["logp"])


def copg(g):
    r = [s["reward"] - 0.06 * ratio(s) for s in g]
    return sum((r[i] - r[j]) ** 2 for i in range(len(r)) for j in range(i)) / (len(r) - 1) / 0.12


def srpo(g):
    w, low, wl, lw, ll, ww = map(ratio, g)
    policy = (0.5 - 0.005 * (w - low + wl - lw)) ** 2
    reviser = 0.5 * ((0.5 - 0.01 * (wl - ll)) ** 2 + (0.5 - 0.01 * (ww - lw)) ** 2)
    return 0.75 * policy + 0.25 * reviser


def kto(groups):
    terms = []
    for s in (s for g in groups for s in g):
        h, z = ratio(s), s["baseline"]
        terms.append(1 - sigmoid(0.1 * (h - z)) if s["reward"] > 0 else 1 - sigmoid(0.1 * (z - h)))
    return float(np.mean(terms))


def relative(g):
    rewards = np.array([s["reward"] for s in g])
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)


def grpo(g):
    terms = []
    for s, advantage in zip(g, relative(g), strict=True):
        tokens = []
        for p, q, old in zip(s["logp"], s["ref"], s["old"], strict=True):
            k3 = math.exp(q - p) - (q - p) - 1
            tokens.append(ppo(math.exp(p - old), advantage, 0.2, 0.2) + 0.04 * k3)
        terms.append(np.mean(tokens))
    return np.mean(terms)


def dapo(groups):
    return float(np.mean([
        ppo(math.exp(p - old), advantage, 0.2, 0.28)
        for g in groups
        for s, advantage in zip(g, relative(g), strict=True)
        for p, old in zip(s["logp"], s["old"], strict=True)
    ]))  # fmt: skip


def value_network(groups):
    return float(np.mean([
        ppo(math.exp(p - old), advantage, 0.2, 0.2)
        for g in groups
        for s in g
        for p, old, advantage in zip(s["logp"], s["old"], s["advantage"], strict=True)
    ]))  # fmt: skip


def leave_one_out(g, beta):
    shaped = [s["reward"] - beta * float(np.sum(np.array(s["old"]) - np.array(s["ref"]))) for s in g]
    return [r - np.mean(shaped[:i] + shaped[i + 1 :]) for i, r in enumerate(shaped)]


def rloo(g):
    advantages = leave_one_out(g, 0.05)
    return np.mean([ppo(math.exp(ratio(s, "old")), a, 0.2, 0.2) for s, a in zip(g, advantages, strict=True)])


def mdloo(g):
    terms = []
    for s, advantage in zip(g, leave_one_out(g, 0.05), strict=True):
        rho = math.exp(ratio(s, "old"))
        terms.append(-rho * advantage + 0.1 * (rho * math.log(rho) - rho + 1))
    return np.mean(terms)


FORMULAS = {"ce": ce, "distill": distill, "kto": kto, "dapo": dapo, "ppo": value_network} | {
    function.__name__: mean(function) for function in (bradley_terry, dpo, ipo, slic, copg, srpo, grpo, rloo, mdloo)
}
