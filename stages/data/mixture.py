"""Which mix of domains to train on, from small models trained on random mixes: each domain's loss as a function of the mix.

As RegMix does (arXiv 2407.01492), with the form of the data mixing laws (arXiv 2403.16952, eq. 1): the loss on domain i of a
model trained on shares r is c_i + exp(t_i . r), whose t_i follow by least squares for each c_i of a grid, of which the one
stays that predicts left-out models best. The sum over the domains is convex in r: its minimum over the mixes is the answer.
Close to a share of nothing a loss rises faster than any exponential, and nobody trains there: a fifth of every mix is dealt
out evenly, of those that are tried and of the answer.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.stage import Artifact, ConfigError, Context, CuveeError, Input, Kind, option, unknown

VERSION = "2"
INPUTS = {"models": Input(Kind.CHECKPOINT, many=True), "tokens": Input(Kind.TOKENS)}
OUTPUT = Kind.REPORT
FLOORS = np.concatenate([[0.0], 1 - np.logspace(0, -2, 20)[1:]])  # c_i, as shares of the smallest loss seen
STEPS, RATE = 3000, 0.5
EVEN = 0.2  # of a mix


@dataclass
class Config:
    target: dict[str, float] = option({}, "weight of each domain's loss in the mix that is looked for; empty = all alike")
    tokens: int = option(200_000, "held-out tokens a domain that are scored")
    length: int = option(1024, "longest piece of a document, in tokens")
    batch_tokens: int = option(16_384, "tokens scored at once; decides the last digits")


def check(config: Config, inputs: dict[str, Any]) -> None:
    """Raises ConfigError for models trained without a mix, or fewer than the domains need."""
    blends = {name: getattr(model, "blend", None) for name, model in inputs.get("models", {}).items()}
    domains = {domain for blend in blends.values() for domain in blend or {}}
    for name, blend in blends.items():
        if not blend:
            raise ConfigError(f"models.{name}: blend is empty; train each model on a mix of its own")
    if len(blends) < len(domains) + 2:
        raise ConfigError(f"models: {len(blends)} are too few for {len(domains)} domains; train at least {len(domains) + 2}")
    for domain, weight in config.target.items():
        if domain not in domains or not weight >= 0:
            raise ConfigError(f"target: {unknown(domain, sorted(domains))}" if domain not in domains else f"target.{domain}: {weight} is negative")


def run(config: Config, inputs: dict[str, Artifact], out: Path, ctx: Context) -> dict[str, float]:
    """Writes mixture.json: mixes and losses (nats a token) of all models, the fit, the best mix and what it promises."""
    blends = {name: model.record["config"]["blend"] for name, model in inputs["models"].items()}
    domains = sorted({domain for blend in blends.values() for domain in blend})
    names = sorted(blends)
    shares = np.array([[blends[name].get(domain, 0.0) for domain in domains] for name in names])
    shares /= shares.sum(1, keepdims=True)
    losses = np.array([_losses(config, inputs["models"][name].path, inputs["tokens"].path, domains, ctx) for name in names])
    weights = np.array([config.target.get(domain, 0.0) if config.target else 1.0 for domain in domains])
    weights /= weights.sum()
    fits = [fit(shares, losses[:, i]) for i in range(len(domains))]
    best = minimum(fits, weights)
    promised = predict(fits, best[None])[0]
    left_out = np.stack([one["left_out"] for one in fits], 1)
    seen, expected = losses @ weights, left_out @ weights
    result = {
        "domains": domains,
        "models": [{"model": name, "blend": dict(zip(domains, r.tolist(), strict=True)), "loss": dict(zip(domains, loss.tolist(), strict=True)),
                    "target": float(loss @ weights)} for name, r, loss in zip(names, shares, losses, strict=True)],
        "fit": {domain: {"floor": one["floor"], "t": one["t"].tolist(), "left_out_error": float(np.abs(one["left_out"] - losses[:, i]).mean()),
                         "spread": float(losses[:, i].std())} for i, (domain, one) in enumerate(zip(domains, fits, strict=True))},
        "left_out_rank_correlation": rank_correlation(seen, expected),
        "best": dict(zip(domains, best.round(4).tolist(), strict=True)), "promised": dict(zip(domains, promised.tolist(), strict=True)),
        "promised_target": float(promised @ weights), "best_seen": names[int(seen.argmin())], "best_seen_target": float(seen.min()),
    }  # fmt: skip
    (out / "mixture.json").write_text(json.dumps(result, indent=1) + "\n")
    best_mix = ", ".join(f"{domain}: {share:.3f}" for domain, share in result["best"].items())
    ctx.log(f"best mix: {best_mix}; train on it with pretrain.blend='{{{best_mix}}}'")
    ctx.log(f"target {result['promised_target']:.4f}, of the mixes tried {seen.min():.4f} to {seen.max():.4f}; rank correlation of "
            f"left-out models {result['left_out_rank_correlation']:.2f}")  # fmt: skip
    return {"target": result["promised_target"], "best_seen": result["best_seen_target"], "rank_correlation": result["left_out_rank_correlation"],
            **{f"share/{domain}": share for domain, share in result["best"].items()}}  # fmt: skip


def mixes(domains: list[str], count: int, seed: int) -> list[dict[str, float]]:
    """`count` random mixes to four digits, spread alike (Dirichlet with parameter 1) over those of which EVEN is dealt out evenly."""
    drawn = EVEN / len(domains) + (1 - EVEN) * np.random.default_rng(seed).dirichlet(np.ones(len(domains)), count)
    return [dict(zip(domains, row, strict=True)) for row in drawn.round(4).tolist()]


def fit(shares: np.ndarray, loss: np.ndarray) -> dict[str, Any]:
    """floor c and t [domains] of loss [models] = c + exp(shares [models, domains] @ t), and the losses predicted by leaving out.

    A little ridge keeps t finite where models are few. The floor with the smallest left-out squared error is taken.
    """
    found: list[tuple[float, dict[str, Any]]] = []
    gram = shares.T @ shares + 1e-4 * np.eye(shares.shape[1])
    hat = shares @ np.linalg.solve(gram, shares.T)
    for part in FLOORS:
        floor = part * float(loss.min())
        logs = np.log(loss - floor)
        t = np.linalg.solve(gram, shares.T @ logs)
        left_out = floor + np.exp(logs - (logs - shares @ t) / np.maximum(1 - np.diag(hat), 1e-6))
        found.append((float(((left_out - loss) ** 2).sum()), {"floor": floor, "t": t, "left_out": left_out}))
    return min(found, key=lambda one: one[0])[1]


def predict(fits: list[dict[str, Any]], shares: np.ndarray) -> np.ndarray:
    """Losses [models, domains] of mixes [models, domains]."""
    return np.stack([one["floor"] + np.exp(shares @ one["t"]) for one in fits], 1)


def minimum(fits: list[dict[str, Any]], weights: np.ndarray) -> np.ndarray:
    """The mix [domains] with the smallest weighted loss: exponentiated gradient on what is not EVEN, which stays on the simplex."""
    t = np.stack([one["t"] for one in fits])
    free = even = np.full(t.shape[1], 1 / t.shape[1])
    for _ in range(STEPS):
        gradient = (1 - EVEN) * (weights * np.exp(t @ (EVEN * even + (1 - EVEN) * free))) @ t
        free = free * np.exp(-RATE * (gradient - gradient @ free))
        free /= free.sum()
    return EVEN * even + (1 - EVEN) * free


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(one)).astype(float) for one in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def _losses(config: Config, model: Path, tokens: Path, domains: list[str], ctx: Context) -> list[float]:
    """Nats a token on each domain's held-out text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stages.evaluation.perplexity import byte_lengths, measure, windows
    from stages.model.inference import extend

    network = extend(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)).to(ctx.device).eval()
    bytes_of = byte_lengths(AutoTokenizer.from_pretrained(model), network.config.vocab_size)
    found = []
    for domain in domains:
        pieces = windows(tokens / f"heldout-{domain}", config.tokens, config.length) if (tokens / f"heldout-{domain}.idx").exists() else []
        if not pieces:
            raise CuveeError(f"data.mixture: domain {domain} has no held-out text to score; raise data.options.split.heldout")
        found.append(measure(network, pieces, bytes_of, config.batch_tokens)["nats_per_token"])
    return found
