"""Arbitrage: the completions of several policies to the same prompts as one set, for the best of all to be learned from.

Each policy may be the best teacher of some prompts and none of all (Odumakin et al., "Multilingual Arbitrage",
arXiv 2408.14960).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.rollout._collect import read_jsonl, write_jsonl
from stages.stage import ConfigError, Context, CuveeError, Input, Kind, option

VERSION = "1"
INPUTS = {"pools": Input(Kind.PAIRS, many=True)}
OUTPUT = Kind.PAIRS
LISTS = ("completions", "tokens", "logprobs", "rewards")  # of a row, a value each completion


@dataclass
class Config:
    best: int = option(0, "completions kept of each prompt, those of the highest reward; 0 keeps all")


def check(config: Config, inputs: dict[str, Any]) -> None:
    if config.best < 0:
        raise ConfigError(f"best: {config.best} is negative; give a number of completions, or 0 for all")


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Write `samples.jsonl`: a row a prompt that every pool has, with all of its completions and `policies`, who wrote each;
    and `summary.json`. Returns `won/<pool>`, the share of prompts whose best completion is that pool's.

    Raises CuveeError for pools without a prompt in common, or rewarded by different rewards.
    """
    pools = {name: _rows(inputs["pools"][name].path) for name in sorted(inputs["pools"])}
    common = set.intersection(*(set(rows) for rows in pools.values()))
    if not common:
        raise CuveeError(
            f"pools: {', '.join(pools)} have no prompt in common; sample them with one seed and the same prompts"
        )
    rows = [_pooled({name: pool[key] for name, pool in pools.items()}, config.best) for key in sorted(common)]
    write_jsonl(out / "samples.jsonl", rows)
    winners = [max(zip(row["rewards"], row["policies"], strict=True), key=lambda pair: pair[0])[1] for row in rows]
    won = {name: winners.count(name) / len(rows) for name in pools}
    mean = sum(max(row["rewards"]) for row in rows) / len(rows)
    (out / "summary.json").write_text(json.dumps({"prompts": len(rows), "best": mean, "won": won}, indent=1) + "\n")
    ctx.log(f"{len(rows)} prompts; best of " + ", ".join(f"{name} {share:.0%}" for name, share in won.items()))
    return {"prompts": len(rows), "best": mean, **{f"won/{name}": share for name, share in won.items()}}


def _rows(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """By prompt; one that was drawn again has the completions of each time."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in read_jsonl(folder / "samples.jsonl"):
        known = found.setdefault((row["domain"], row["id"]), row)
        if known is not row:
            for key in LISTS:
                known[key] += row[key]
            for name, values in known["parts"].items():
                values += row["parts"][name]
    return found


def _pooled(rows: dict[str, dict[str, Any]], best: int) -> dict[str, Any]:
    first = next(iter(rows.values()))
    for name, row in rows.items():
        if set(row["parts"]) != set(first["parts"]):
            raise CuveeError(
                f"pools: {name} is rewarded by {', '.join(row['parts'])}, {next(iter(rows))} by {', '.join(first['parts'])}; "
                "sample all with the same rewards"
            )
    found = {key: [value for row in rows.values() for value in row[key]] for key in LISTS}
    found["policies"] = [name for name, row in rows.items() for _ in row["completions"]]
    parts = {name: [value for row in rows.values() for value in row["parts"][name]] for name in first["parts"]}
    order = sorted(range(len(found["rewards"])), key=lambda i: -found["rewards"][i])[: best or None]
    found = {key: [values[i] for i in order] for key, values in found.items()}
    return first | found | {"parts": {name: [values[i] for i in order] for name, values in parts.items()}}
