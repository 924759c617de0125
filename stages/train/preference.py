"""Offline training on sampled completions (SRPO, DPO, CoPG, ... by name), against the starting model as reference."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.rollout._collect import read_pairs
from stages.stage import ConfigError, Context, CuveeError, Estimate, Input, Kind, option
from stages.train._groups import ObjectiveConfig, needs_values
from stages.trainer.config import TrainConfig

VERSION = "2"
INPUTS = {
    "init": Input(Kind.CHECKPOINT),
    "pairs": Input(Kind.PAIRS),
    "own": Input(Kind.PAIRS, optional=True),  # a user's, beside the sampled ones
}
OUTPUT = Kind.CHECKPOINT
DISTRIBUTED = True
KINDS = ("pair", "revisions", "completions")


@dataclass
class Config(ObjectiveConfig, TrainConfig):
    objective: str = option("srpo", "what is optimised", "objectives")
    lr: float = option(1e-6, "peak learning rate")
    batch_groups: int = option(64, "prompts an optimizer step")
    pairs_per_prompt: int = option(1, "pairs made of each prompt's completions, those furthest apart in reward first")
    min_mean_reward: float | None = option(None, "prompts whose completions are rewarded less on average are left out")


def check(config: Config, inputs: dict[str, Any]) -> None:
    config.check()
    if needs_values(config.resolve(*KINDS)[0]):
        raise ConfigError(f"objective: {config.objective} needs a value network; use the stage train.rl, or copg, grpo, rloo")
    if config.batch_groups < 1 or config.pairs_per_prompt < 1:
        raise ConfigError(
            f"batch_groups is {config.batch_groups}, pairs_per_prompt {config.pairs_per_prompt}; give at least 1"
        )


def external(config: Config) -> dict[str, Any]:
    return config.external()


def estimate(config: Config, inputs: dict[str, Any]) -> Estimate:
    # How many completions a prompt has is the samples' to know.
    sequences = {"pair": 2 * config.pairs_per_prompt, "revisions": 6 * config.pairs_per_prompt, "completions": 4}
    tokens = config.steps * config.batch_groups * sequences[config.resolve(*KINDS)[0].GROUP] * config.sequence_length
    return Estimate(parameters=inputs["init"].parameters, train_tokens=tokens)


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Train and write the CHECKPOINT folder. Raises CuveeError when no prompt's rewards tell completions apart."""
    from transformers import AutoTokenizer

    from stages.train._groups import Groups, grouper_of, objective, prepared
    from stages.trainer.loop import train

    init: Path = inputs["init"].path
    module, _ = config.resolve(*KINDS)
    rows = read_pairs(inputs)
    floor = config.min_mean_reward
    good = [r for r in rows if r["rewards"] and (floor is None or sum(r["rewards"]) / len(r["rewards"]) >= floor)]
    grouper = grouper_of(
        config, module, AutoTokenizer.from_pretrained(init), per_prompt=config.pairs_per_prompt, behaviour=module.NEEDS_BEHAVIOUR
    )
    prompts = [groups for groups in map(grouper, good) if groups]
    if not prompts:
        raise CuveeError(
            f"none of {len(rows)} prompts gives a {module.GROUP} group ({len(good)} above min_mean_reward, "
            f"min_gap {config.min_gap}, sequence_length {config.sequence_length}); sample more or loosen these"
        )
    ctx.log(f"{sum(map(len, prompts))} groups ({module.GROUP}) of {len(prompts)} prompts; {len(rows)} were sampled")
    metrics = train(
        config=config, stream=prepared(module, Groups(prompts, config.batch_groups, config.seed)),
        objective=objective(config, *KINDS), out=out, ctx=ctx, init=init, tokenizer=init,
        reference=init if module.NEEDS_REFERENCE else None,
    )  # fmt: skip
    return metrics | {"prompts": len(prompts)}
