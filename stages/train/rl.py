"""Reinforcement learning: sample with the policy, reward, and train on the samples (CoPG; other objectives by name).

Online, the rollouts of a block of `rollout_every` steps are sampled with the weights at its first step, or off-policy at
the first step of the block before; offline (rollout_every 0) there is one block. See _rollouts.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.chat.messages import said
from stages.rollout._collect import SampleConfig, read_jsonl, statistics, write_jsonl
from stages.stage import ConfigError, Context, CuveeError, Estimate, Input, Kind, option
from stages.train._groups import ObjectiveConfig, fewest, needs_values
from stages.trainer.config import TrainConfig

VERSION = "8"
INPUTS = {
    "init": Input(Kind.CHECKPOINT),
    "prompts": Input(Kind.PROMPTS, many=True),
    "reward": Input(Kind.REWARD_MODEL, optional=True),
}
OUTPUT = Kind.CHECKPOINT
DISTRIBUTED = True
KINDS = ("completions", "pair", "revisions")
DISPLACED = -0.2  # nats, log pi/pi_ref of the best completions below which a run has moved their probability elsewhere
SHOWN, SHOWN_CHARACTERS = 16, 2000  # rows of `samples.json` of the first and of the last block; of a text in them


@dataclass
class Config(ObjectiveConfig, SampleConfig, TrainConfig):
    lr: float = option(1e-6, "peak learning rate")
    batch_groups: int = option(64, "prompts an optimizer step")
    rollout_every: int = option(
        1, "steps between rollouts with the current weights; 0 samples once, at the start (offline)"
    )
    off_policy: bool = option(
        False,
        "sample a rollout with the weights at the start of the one before: with rollout_every 1 those of one step ago",
    )
    rollout_prompts: int = option(0, "prompts of a rollout, trained on in epochs; 0 = each step has prompts of its own")

    def block(self, step: int) -> tuple[int, int]:
        """(number, first step) of the rollout block that step belongs to."""
        number = step // self.rollout_every if self.rollout_every else 0
        return number, number * self.rollout_every

    def prompts_of_block(self) -> int:
        steps = min(self.rollout_every, self.steps) or self.steps
        return self.rollout_prompts or steps * self.batch_groups


def check(config: Config, inputs: dict[str, Any]) -> None:
    config.check()
    config.check_sampling(inputs)
    module, options = config.resolve(*KINDS)
    if needs_values(module) and options.value_steps >= config.steps:
        raise ConfigError(
            f"options.value_steps: {options.value_steps} of {config.steps} steps train the value network alone and leave "
            "none for the policy; give fewer, or more steps"
        )
    if module.NEEDS_BEHAVIOUR and (config.with_answer or config.temperature != 1):
        raise ConfigError(
            f"objective: {config.objective} weighs completions by the log-probabilities of their sampling, which no "
            f"answer (with_answer {config.with_answer}) and no other temperature than 1 (temperature "
            f"{config.temperature:g}) has; set with_answer=false temperature=1, or choose copg"
        )
    if config.batch_groups < 1 or config.rollout_every < 0 or config.rollout_prompts < 0:
        raise ConfigError(
            f"batch_groups is {config.batch_groups}, rollout_every {config.rollout_every}, rollout_prompts "
            f"{config.rollout_prompts}; give at least 1, 0 and 0"
        )
    if config.off_policy and not config.rollout_every:
        raise ConfigError(
            "off_policy: true, but with rollout_every 0 all rollouts are sampled at the start; give rollout_every 1 or more"
        )
    if config.completions < 1 or config.completions + config.with_answer < fewest(module):
        raise ConfigError(f"completions: {config.completions} contrasts nothing; give at least {fewest(module)}")
    if config.temperature == 0 and not config.with_answer:
        raise ConfigError("temperature: 0 samples the same completion each time, which contrasts nothing; give 1")
    if needs_values(module) and config.context_parallel > 1:
        raise ConfigError(
            f"context_parallel: {config.context_parallel}, under which objective {config.objective} and its value network were "
            "never tried; set it to 1 or choose copg, grpo or rloo"
        )


def external(config: Config) -> dict[str, Any]:
    return config.external() | config.graders()


def estimate(config: Config, inputs: dict[str, Any]) -> Estimate:
    blocks = config.block(config.steps - 1)[0] + 1
    prompts = blocks * config.prompts_of_block()
    generated = prompts * config.completions * config.max_new_tokens
    trained = config.steps * config.batch_groups * (config.completions + config.with_answer) * config.sequence_length
    trained *= 1 + needs_values(config.resolve(*KINDS)[0])
    return Estimate(parameters=inputs["init"].parameters, train_tokens=trained, generated_tokens=generated,
                    requests=config.requests(prompts))  # fmt: skip


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Train, write the CHECKPOINT folder, `rollouts.jsonl` (all rollouts with rewards, a line a prompt) and `samples.json`
    (some of the first and of the last, a column a list, as MLflow shows tables).

    Returns the trainer's metrics and `reward_first`, `reward_last`: mean sampled reward of the first and last block, and
    the shares, since the engine was made, of the time spent generating, rewarding, syncing weights and training.
    Raises CuveeError when engine and trainer disagree after a sync, or no prompt's rewards differ.
    """
    from stages.train._critic import Critic, Criticised
    from stages.train._groups import objective, prepared
    from stages.train._rollouts import Rollouts
    from stages.trainer.loop import train

    init: Path = inputs["init"].path
    module, options = config.resolve(*KINDS)
    stream, critic = Rollouts(config, inputs, ctx, module), None
    seen = prepared(module, stream)
    if needs_values(module):
        critic = Critic(inputs["reward"].path if "reward" in inputs else init, module, options)
        seen = Criticised(stream, critic, config, ctx)
    metrics = train(
        config=config, stream=seen, objective=objective(config, *KINDS), out=out, ctx=ctx, init=init, tokenizer=init,
        reference=init if module.NEEDS_REFERENCE else None, critic=critic,
    )  # fmt: skip
    blocks = [read_jsonl(path) for path in stream.files()]
    alike_too = fewest(module) == 1  # completions rewarded alike teach something too
    if not any((alike_too or len(set(row["rewards"])) > 1) and stream.grouper(row) for rows in blocks for row in rows):
        raise CuveeError(
            f"rewards: no prompt of any rollout has completions that differ by more than min_gap {config.min_gap} (or they "
            f"exceed sequence_length {config.sequence_length}), so nothing was learned; sample more completions, or set "
            "with_answer=true"
        )
    write_jsonl(out / "rollouts.jsonl", [{"block": i, **row} for i, rows in enumerate(blocks) for row in rows])
    (out / "samples.json").write_text(json.dumps(_table([blocks[0], blocks[-1]][: len(blocks)]), ensure_ascii=False))
    first, last = (statistics(rows, config.completions) for rows in (blocks[0], blocks[-1]))
    metrics = {"reward_first": first["reward"], "reward_last": last["reward"], "contrast": last["contrast"]} | metrics
    if (ratio := metrics.get("best_ratio", metrics.get("chosen_ratio", 0.0))) < DISPLACED:
        ctx.log(
            f"warning: even the best completions are {-ratio:.1f} nats less likely than at the start, so the policy writes what "
            "nobody judged; lower lr or steps, raise options.beta or sft_weight, or sample anew (rollout_every=1)"
        )
    return metrics | stream.clock.total()


def _table(blocks: list[list[dict[str, Any]]]) -> dict[str, list[Any]]:
    """Column -> values: the first sampled completion of some prompts of each block, with its rewards."""
    rows = []
    for row in (row for block in blocks for row in block[:SHOWN]):
        prompt, completion = said(row["messages"][-1]), row["completions"][0]
        own = {f"reward/{name}": values[0] for name, values in row["parts"].items() if values[0] is not None}
        rows.append({
            "version": row["version"], "domain": row["domain"], "prompt": prompt[-SHOWN_CHARACTERS:],
            "completion": completion[:SHOWN_CHARACTERS], "tokens": len(row["tokens"][0]), "reward": row["rewards"][0], **own,
        })  # fmt: skip
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(k for row in rows for k in row)}
