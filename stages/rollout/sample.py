"""Sample completions of prompts with a policy and reward them: the material of reward models, best-of-N and preferences."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.rollout._collect import (
    SampleConfig,
    Sampler,
    load_prompts,
    render_prompt,
    schedule,
    statistics,
    write_jsonl,
)
from stages.stage import ConfigError, Context, CuveeError, Estimate, Input, Kind, option

VERSION = "7"
INPUTS = {
    "policy": Input(Kind.CHECKPOINT),
    "prompts": Input(Kind.PROMPTS, many=True),
    "reward": Input(Kind.REWARD_MODEL, optional=True),
}
OUTPUT = Kind.PAIRS


@dataclass
class Config(SampleConfig):
    prompts: int = option(10000, "prompts sampled, drawn by `mix`; a prompt comes again only after all of its domain")
    split: str = option("train", "prompts to train on, or those kept from training", ("train", "heldout"))
    sequence_length: int = option(8192, "longest prompt with its completion, in tokens; longer prompts are left out")
    seed: int = option(0, "seed of the choice of prompts and of the samples")


def check(config: Config, inputs: dict[str, Any]) -> None:
    config.check_sampling(inputs)
    if config.prompts < 1:
        raise ConfigError(f"prompts: {config.prompts} samples nothing; give at least 1")


def external(config: Config) -> dict[str, Any]:
    return config.graders()


def estimate(config: Config, inputs: dict[str, Any]) -> Estimate:
    generated = config.prompts * config.completions * config.max_new_tokens
    requests = config.requests(config.prompts)
    return Estimate(parameters=inputs["policy"].parameters, generated_tokens=generated, requests=requests)


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Write `samples.jsonl` (a line a prompt, see `Sampler`) and `summary.json` (statistics by domain).

    Raises CuveeError when every prompt is longer than sequence_length allows.
    """
    from stages.rewards._common import refuse_idle

    engine = config.make_engine(inputs["policy"].path, ctx)
    sampler = Sampler(config, engine, ctx, inputs["reward"].path if "reward" in inputs else None)
    prompts = load_prompts(inputs["prompts"], config.mix, config.split)
    drawn = schedule({d: len(rows) for d, rows in prompts.items()}, config.mix, config.prompts, config.seed)
    chosen = [prompts[domain][i] for domain, i in drawn]
    longest = config.sequence_length - config.max_new_tokens
    fits = [p for p in chosen if len(render_prompt(engine.tokenizer, p)) <= longest]
    if not fits:
        raise CuveeError(f"sequence_length: no prompt is within {longest} tokens (sequence_length - max_new_tokens); "
                         f"raise sequence_length")  # fmt: skip
    refuse_idle(config.verified_by(), fits)
    rows = sampler(fits, config.seed)
    seconds = max(sampler.seconds["generating"], 1e-9)
    write_jsonl(out / "samples.jsonl", rows)
    by_domain = {d: [row for row in rows if row["domain"] == d] for d in sorted({row["domain"] for row in rows})}
    summary = {
        "prompts": len(rows),
        "left_out": len(chosen) - len(fits),
        "all": statistics(rows, config.completions),
        "domains": {d: {"prompts": len(some), **statistics(some, config.completions)} for d, some in by_domain.items()},
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
    tokens = sum(len(t) for row in rows for t in row["tokens"][: config.completions])
    ctx.log(f"{len(rows)} prompts, {tokens} tokens in {seconds:.1f} s; {len(chosen) - len(fits)} prompts too long")
    return {**summary["all"], "tokens_per_second": tokens / seconds, **sampler.spent()}
