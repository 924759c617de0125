"""What a recipe has to show: each expert better than its parent, polishing preferred, no domain lost; with its interval."""

from __future__ import annotations

from typing import Any

from stages.evaluation.stats import bootstrap, wins
from stages.report.facts import Facts, Model, origin, parents

LEAST_WIN = 0.6  # of the final model against the last soup, by the reward model
MOST_FALL = 0.02  # of a domain's mean score, in [0, 1]
SEED = 0  # of the bootstrap
MEASURED = ("verifier", "reward_model")  # the rewards that an evaluation holds


def claims(facts: Facts) -> list[dict[str, Any]]:
    """Each claim with `value`, `low`, `high` (paired bootstrap over prompts, 95 %), the seed of the training run behind it,
    and `shown`: an expert's gain is above 0 with 95 % confidence; the win rate reaches 60 %; no fall is above 2 points.

    Empty without soups on the chain: there are no experts, and nothing to compare the final model with.
    """
    found = []
    for _, experts in facts.soups():
        for domain, expert in sorted(experts.items()):
            parent = facts.models.get(expert.parent or "")
            if domain in facts.domains and parent:
                found.append(_expert(facts, expert, parent, domain))
    if facts.soups() and facts.soups()[-1][0].name != facts.final.name:
        soup = facts.soups()[-1][0]
        found += [_win(facts, facts.final, soup)] if _judged(facts.final, soup) else []
        found += [_fall(facts, facts.final, soup, domain) for domain in facts.domains]
    return found


def _expert(facts: Facts, expert: Model, parent: Model, domain: str) -> dict[str, Any]:
    run = _trained(facts, expert.record)
    weights = run["config"].get("rewards") or {"verifier": 1.0} if run["stage"] == "train.rl" else None
    unseen = sorted(name for name, weight in (weights or {}).items() if weight and name not in MEASURED)
    measure = "score" if weights is None else "reward" + (f" without {', '.join(unseen)}" if unseen else "")
    pairs = [
        (row, parent.samples[i]) for i, row in expert.samples.items() if row["domain"] == domain and i in parent.samples
    ]
    gains = [_value(after, weights) - _value(before, weights) for after, before in pairs]
    value, low, high = bootstrap(gains, SEED)
    return {
        "claim": f"{expert.name} above {parent.name}", "on": domain, "measure": measure, "prompts": len(gains),
        "value": value, "low": low, "high": high, "seed": _seed(facts, expert), "shown": low > 0,
    }  # fmt: skip


def _value(row: dict[str, Any], weights: dict[str, float] | None) -> float:
    """The score, or with RL's weights its own reward of the answer: of sampled ones where there are any, else greedy."""
    if weights is None:
        return row["score"]
    verifier = row.get("reward_sampled", row["reward"])
    return weights.get("verifier", 0.0) * verifier + weights.get("reward_model", 0.0) * row.get("reward_model", 0.0)


def _trained(facts: Facts, record: dict[str, Any]) -> dict[str, Any]:
    """The record of the training run behind a model: its own, or that of the model it was chosen as, or of the first one
    that it was merged from."""
    while record["stage"] in ("merge.soup", "evaluation.choose"):
        merged = record["stage"] == "merge.soup"
        first = next((fp for arg, fp, _ in parents(record) if merged and arg.startswith("models.")), origin(record))
        if first not in facts.records:
            break
        record = facts.records[first]
    return record


def _seed(facts: Facts, model: Model) -> int | None:
    return _trained(facts, model.record)["config"].get("seed")


def _judged(*models: Model) -> bool:
    return all("reward_model" in row for model in models for row in model.samples.values())


def _win(facts: Facts, final: Model, soup: Model) -> dict[str, Any]:
    shared = [i for i in final.samples if i in soup.samples]
    scores = [[model.samples[i]["reward_model"] for i in shared] for model in (final, soup)]
    value, low, high = bootstrap(wins(*scores), SEED)
    return {
        "claim": f"{final.name} preferred to {soup.name}", "on": "all domains", "measure": "win rate",
        "prompts": len(shared), "value": value, "low": low, "high": high, "seed": _seed(facts, final),
        "shown": value >= LEAST_WIN,
    }  # fmt: skip


def _fall(facts: Facts, final: Model, soup: Model, domain: str) -> dict[str, Any]:
    ids = [i for i, row in final.samples.items() if row["domain"] == domain and i in soup.samples]
    value, low, high = bootstrap([final.samples[i]["score"] - soup.samples[i]["score"] for i in ids], SEED)
    return {
        "claim": f"{final.name} not below {soup.name}", "on": domain, "measure": "score", "prompts": len(ids),
        "value": value, "low": low, "high": high, "seed": _seed(facts, final), "shown": value >= -MOST_FALL,
    }  # fmt: skip
