"""A judge's win rates: each model's greedy answers to the held-out prompts against a baseline's, asked in both orders."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.evaluation.stats import wilson
from stages.rollout._collect import read_jsonl
from stages.stage import (
    Artifact,
    ConfigError,
    Context,
    CuveeError,
    Estimate,
    Input,
    Kind,
    identity,
    option,
    placement,
    unknown,
)
from stages.teacher.client import Teacher, client_of, teachers
from stages.teacher.judge import compare, comparisons

VERSION = "2"
INPUTS = {
    "models": Input(Kind.SCORES, many=True),
    "baseline": Input(Kind.SCORES),
    "prompts": Input(Kind.PROMPTS, many=True),
}
OUTPUT = Kind.VERDICTS


@dataclass
class Config:
    teachers: dict[str, Any] = placement({}, "name: {model, url, key, ...}, see Teacher in stages/teacher/client.py")
    judge: str = option("", "name of the teacher that judges; may be empty where there is one")
    prompts_per_domain: int = option(100, "prompts judged a domain, the first that were answered; 0 takes all")
    cache: str = placement("", "folder that keeps the judgements for other runs too")
    budget: float = placement(0.0, "most to spend, in the currency of the prices; 0 = no limit")
    dry_run: bool = placement(False, "count requests, tokens and cost, send nothing and stop")


def check(config: Config, inputs: dict[str, Any]) -> None:
    """Raises ConfigError without teachers, or a judge among them."""
    name, found = _judge(config)
    if name not in found:
        raise ConfigError(f"judge: {unknown(name, sorted(found))}")
    if config.prompts_per_domain < 0:
        raise ConfigError(f"prompts_per_domain: {config.prompts_per_domain} is negative; 0 takes all")


def external(config: Config) -> dict[str, Any]:
    """What of the judge decides its answers."""
    name, found = _judge(config)
    return {"judge": identity(found[name])} if name in found else {}


def estimate(config: Config, inputs: dict[str, Any]) -> Estimate:
    """As if a domain had 500 held-out prompts where all are taken."""
    return Estimate(requests=2 * len(inputs["models"]) * len(inputs["prompts"]) * (config.prompts_per_domain or 500))


def run(config: Config, inputs: dict[str, Artifact], out: Path, ctx: Context) -> dict[str, float]:
    """Writes verdicts.jsonl (model, prompt, domain, win: 1, 0.5 or 0) and win_rates.json: of each model over all and by domain
    the rate with its 95 % interval, the share of verdicts that outlast the exchange of the answers, judgements that could not
    be read. Raises CuveeError for a dry run, with its counts, and where the models answered other prompts."""
    name, found = _judge(config)
    models = sorted(inputs["models"])
    pairs = {model: _pairs(config, inputs, model) for model in models}
    requests = [request for model in models for request in comparisons(name, *pairs[model])]
    client = client_of(config, {name: found[name]}, requests, "teacher.compare", ctx)
    table: dict[str, Any] = {}
    with open(out / "verdicts.jsonl", "w", encoding="utf-8") as file:
        for model in models:
            rows, first, second = pairs[model]
            verdicts = compare(client, name, rows, first, second)
            by: dict[str, list[float]] = {"all": verdicts.wins}
            for row, win in zip(rows, verdicts.wins, strict=True):
                by.setdefault(row["domain"], []).append(win)
                told = {"model": model, "prompt": row["id"], "domain": row["domain"], "win": win}
                file.write(json.dumps(told) + "\n")
            table[model] = {
                "rates": {d: dict(zip(("mean", "low", "high"), wilson(wins), strict=True)) for d, wins in by.items()},
                "consistent": verdicts.consistent,
                "unreadable": verdicts.unreadable,
            }
    usage = asdict(client.usage[name])
    (out / "win_rates.json").write_text(json.dumps({"models": table, "usage": usage}, indent=1) + "\n")
    rates = {f"win_rate/{model}": one["rates"]["all"]["mean"] for model, one in table.items()}
    return rates | {f"consistent/{model}": one["consistent"] for model, one in table.items()} | {"cost": usage["cost"]}


def _judge(config: Config) -> tuple[str, dict[str, Teacher]]:
    found = teachers(config.teachers, "teachers")
    if not found:
        raise ConfigError("teachers: is empty; give the judge, e.g. {judge: {model: m, url: http://127.0.0.1:8000/v1}}")
    return config.judge or (next(iter(found)) if len(found) == 1 else ""), found


def _pairs(config: Config, inputs: dict[str, Any], model: str) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Prompts, the model's answers, the baseline's."""
    theirs, ours = (
        {row["id"]: row for row in read_jsonl(one.path / "samples.jsonl")}
        for one in (inputs["baseline"], inputs["models"][model])
    )
    if theirs.keys() != ours.keys():
        raise CuveeError(
            f"teacher.compare: {model} and the baseline answered {len(ours.keys() ^ theirs.keys())} prompts apart; evaluate both "
            "with the same prompts and prompts_per_domain"
        )
    rows = []
    for _, prompts in sorted(inputs["prompts"].items()):
        known = [row for row in read_jsonl(prompts.path / "heldout.jsonl") if row["id"] in ours]
        rows += known[: config.prompts_per_domain or None]
    return rows, *([side[row["id"]]["completion"] for row in rows] for side in (ours, theirs))
