"""Of models made from one start, publish the one that a reward model prefers to it most; the start where none is preferred.

The gate at the end of a round of polishing. Judged on held-out prompts that the report's scores don't use (`skip` passes
those over), so that the choice does not flatter them. A model on which a domain falls by more than `most_fall` is not
chosen, where the fall is taken one standard error smaller than it was measured: the noise of a few prompts must not end
every round.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.evaluation._suites import Suite, answer, held_out, judge
from stages.merge.checkpoint import copy_model
from stages.stage import Artifact, ConfigError, Context, Estimate, Input, Kind, option

VERSION = "4"
INPUTS = {
    "start": Input(Kind.CHECKPOINT),
    "models": Input(Kind.CHECKPOINT, many=True),
    "prompts": Input(Kind.PROMPTS, many=True),
    "reward": Input(Kind.REWARD_MODEL),
}
OUTPUT = Kind.CHECKPOINT


@dataclass
class Config(Suite):
    least_win: float = option(0.5, "a model whose win rate against the start is not above this is not chosen")
    most_fall: float = option(0.02, "largest fall of a domain's mean score beyond one standard error, in [0, 1]")


def check(config: Config, inputs: dict[str, Any]) -> None:
    config.check_suite(inputs)
    if not config.skip:
        raise ConfigError("skip: 0 chooses by the prompts that evaluation reports; set evaluate.prompts_per_domain to fewer than a domain has")
    if not 0.5 <= config.least_win < 1 or config.most_fall < 0:
        raise ConfigError(f"least_win is {config.least_win}, most_fall {config.most_fall}; give 0.5 to 1 and 0 or more")


def estimate(config: Config, inputs: dict[str, Any]) -> Estimate:
    models = 1 + len(inputs["models"])
    generated = models * len(inputs["prompts"]) * (config.prompts_per_domain or 500) * config.max_new_tokens
    return Estimate(parameters=inputs["start"].parameters, generated_tokens=generated)


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Copy the chosen CHECKPOINT folder to `out`, beside it `choice.json` with what all candidates reached.

    Returns `chosen/<name>` (1 for the one that was, else 0; `start` among them) and each candidate's `win/<name>` rate.
    """
    prompts = held_out(inputs["prompts"], config.prompts_per_domain, config.skip)
    samples = {}
    for name, model in {"start": inputs["start"], **dict(sorted(inputs["models"].items()))}.items():
        ctx.log(f"{name}:")
        samples[name] = answer(config, model, prompts, ctx)
        judge(samples[name], inputs["reward"], ctx)
    found = {name: compare(rows, samples["start"]) for name, rows in samples.items() if name != "start"}
    chosen = choose(found, config.least_win, config.most_fall)
    source: Artifact = inputs["models"].get(chosen, inputs["start"])
    copy_model(source.path, out)
    choice = {"chosen": chosen, "prompts": len(prompts), "candidates": found}
    (out / "choice.json").write_text(json.dumps(choice, indent=1, sort_keys=True) + "\n")
    for name, one in found.items():
        ctx.log(f"{name}: wins {one['win'][0]:.1%} ({one['win'][1]:.1%} to {one['win'][2]:.1%}), largest fall "
                f"{one['fall']:.3f} ({one['fallen']})")  # fmt: skip
    ctx.log(f"chosen: {chosen}")
    wins = {f"win/{name}": one["win"][0] for name, one in found.items()}
    return {f"chosen/{chosen}": 1.0} | wins | {f"chosen/{name}": 0.0 for name in samples if name != chosen}


def compare(rows: list[dict[str, Any]], start: list[dict[str, Any]]) -> dict[str, Any]:
    """`win`: rate against the start by the reward model, with its interval. `fall`: the largest fall of a domain's mean
    score less its standard error (negative where all rise), `fallen` that domain. Both lists answer the same prompts in
    the same order."""
    from stages.evaluation.stats import win_rate

    falls: dict[str, list[float]] = {}
    for before, after in zip(start, rows, strict=True):
        falls.setdefault(before["domain"], []).append(before["score"] - after["score"])
    sure = {domain: _mean(some) - _error(some) for domain, some in falls.items()}
    fallen = max(sure, key=lambda domain: sure[domain])
    rewards = [[row["reward_model"] for row in one] for one in (rows, start)]
    return {"win": list(win_rate(*rewards)), "fall": sure[fallen], "fallen": fallen}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _error(values: list[float]) -> float:
    """Standard error of the mean."""
    mean, n = _mean(values), len(values)
    return (sum((v - mean) ** 2 for v in values) / max(n - 1, 1) / n) ** 0.5


def choose(found: dict[str, dict[str, Any]], least_win: float, most_fall: float) -> str:
    """The candidate of the highest win rate among those within the limits, the first by name of equals; else "start"."""
    good = [name for name, one in sorted(found.items()) if one["win"][0] > least_win and one["fall"] <= most_fall]
    return max(good, key=lambda name: found[name]["win"][0], default="start")
