"""The report's figures as JSON, for the terminal's closing table and for programs."""

from __future__ import annotations

from typing import Any

from stages.report.facts import Facts, Interval, gains, parameter_count, retention, win_rates


def matrix(facts: Facts, claimed: list[dict[str, Any]]) -> dict[str, Any]:
    """{"models": scores of each model, "steps": what each step of the spine changed, "retention", "win_rates", ...};
    every estimate as {"value", "low", "high"} with its 95 % interval, scores in [0, 1]."""
    return {
        "final": facts.final.name,
        "spine": facts.spine,
        "domains": facts.domains,
        "parameters": parameter_count(facts),
        "models": {
            name: {
                "fingerprint": model.record["fingerprint"],
                "stage": model.record["stage"],
                "parent": model.parent,
                "mean": interval(model.mean(facts.domains)),
                "domains": {domain: interval(model.score(domain)) for domain in facts.domains},
                "lengths": model.scores["lengths"],
                "perplexity": model.scores["perplexity"],
            }
            for name, model in facts.models.items()
        },
        "steps": [
            {
                "model": row["model"],
                "before": row["before"],
                "mean": interval(row["mean"]),
                "domains": {domain: interval(one) for domain, one in row["domains"].items()},
            }
            for row in gains(facts)
        ],
        "claims": claimed,
        "retention": retention(facts),
        "win_rates": [
            row | {"final": interval(row["final"]), "next": interval(row["next"])} for row in win_rates(facts)
        ],
    }


def interval(found: Interval) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), found, strict=True))
