"""The report of a run: one self-contained HTML page, a model card, and the same matrix for programs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.stage import ConfigError, Context, CuveeError, Input, Kind, option

VERSION = "4"
INPUTS = {
    "scores": Input(Kind.SCORES, many=True),
    "export": Input(Kind.EXPORT, optional=True),
    "corpus": Input(Kind.CORPUS, optional=True),
    "reward": Input(Kind.REWARD_MODEL, optional=True),
}
OUTPUT = Kind.REPORT


@dataclass
class Config:
    title: str = option("The Command A recipe", "what stands above the headline")
    hourly_cost: float = option(
        0.0, "price of one hour of the whole machine or cluster, in `currency`; 0 shows no cost"
    )
    currency: str = option("USD", "unit of hourly_cost")
    license: str = option("other", "license in the model card's front matter")


def check(config: Config, inputs: dict[str, Any]) -> None:
    if config.hourly_cost < 0:
        raise ConfigError(f"hourly_cost: {config.hourly_cost} is negative; give a price, or 0 to show no cost")


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Write report.html, model_card.md and matrix.json from the inputs' records and scores alone.

    Raises CuveeError for an empty set of scores, or scores that were taken on different prompts or settings.
    """
    from stages.report.card import card
    from stages.report.claims import claims
    from stages.report.facts import collect
    from stages.report.matrix import matrix
    from stages.report.page import page

    if not inputs["scores"]:
        raise CuveeError("there are no scores to report; evaluate at least one model")
    others = [inputs[name] for name in ("export", "corpus") if name in inputs]
    facts = collect(inputs["scores"], others)
    claimed = claims(facts)
    extras = {
        "corpus": _json(inputs["corpus"].path / "table.json") if "corpus" in inputs else None,
        "parity": _json(inputs["export"].path / "parity.json") if "export" in inputs else None,
        "judged": _json(inputs["reward"].path / "judged.json") if "reward" in inputs else None,
    }
    files = {
        "matrix.json": json.dumps(matrix(facts, claimed), indent=1) + "\n",
        "model_card.md": card(facts, config.license, extras),
        "report.html": page(facts, claimed, config.title, config.hourly_cost, config.currency, extras),
    }
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    ctx.log(f"report of {len(facts.models)} models, {len(facts.domains)} domains, {len(facts.records)} records")
    mean, low, high = facts.final.mean(facts.domains)
    return {"models": len(facts.models), "score": mean, "score_low": low, "score_high": high}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
