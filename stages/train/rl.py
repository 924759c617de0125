"""Reinforcement learning: sample with the policy, reward, and train on the samples (CoPG; other objectives by name).

Online, the rollouts of a block of `rollout_every` steps are sampled with the weights at its first step; offline
(rollout_every 0) there is one block. Rollouts are a function of (configuration, step, weights) and lie in the scratch
folder before they are trained on, so that a resumed run goes on with the very same ones.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.rollout._collect import (
    SampleConfig,
    Sampler,
    load_prompts,
    read_jsonl,
    render_prompt,
    schedule,
    statistics,
    write_jsonl,
)
from stages.stage import ConfigError, Context, CuveeError, Estimate, Input, Kind, option, resolve
from stages.train._groups import ObjectiveConfig
from stages.trainer.config import TrainConfig

VERSION = "2"
INPUTS = {
    "init": Input(Kind.CHECKPOINT),
    "prompts": Input(Kind.PROMPTS, many=True),
    "reward": Input(Kind.REWARD_MODEL, optional=True),
}
OUTPUT = Kind.CHECKPOINT
DISTRIBUTED = True
KINDS = ("completions", "pair", "revisions")
HALF_THRESHOLD = 0.5  # nats between a policy trained in BF16 and the engine's FP32; logits of 30 are known to 0.1
PROBES = 4  # prompts whose first completions check that engine and trainer agree after each sync


@dataclass
class Config(ObjectiveConfig, SampleConfig, TrainConfig):
    lr: float = option(1e-6, "peak learning rate")
    batch_groups: int = option(64, "prompts an optimizer step")
    rollout_every: int = option(
        1, "steps between rollouts with the current weights; 0 samples once, at the start (offline)"
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
    module, _ = config.resolve(*KINDS)
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
    if config.completions + config.with_answer < 2:
        raise ConfigError(f"completions: {config.completions} contrasts nothing; give at least 2")


def external(config: Config) -> dict[str, Any]:
    return config.external()


def estimate(config: Config, inputs: dict[str, Any]) -> Estimate:
    blocks = config.block(config.steps - 1)[0] + 1
    generated = blocks * config.prompts_of_block() * config.completions * config.max_new_tokens
    trained = config.steps * config.batch_groups * (config.completions + config.with_answer) * config.sequence_length
    return Estimate(parameters=inputs["init"].parameters, train_tokens=trained, generated_tokens=generated)


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Train, write the CHECKPOINT folder and `rollouts.jsonl` (all rollouts with rewards, a line a prompt).

    Returns the trainer's metrics and `reward_first`, `reward_last`: mean sampled reward of the first and last block.
    Raises CuveeError when engine and trainer disagree after a sync, or no prompt's rewards differ.
    """
    from stages.train._groups import objective, prepared
    from stages.trainer.loop import train

    init: Path = inputs["init"].path
    module, _ = config.resolve(*KINDS)
    stream = Rollouts(config, inputs, ctx, module)
    metrics = train(
        config=config, stream=prepared(module, stream), objective=objective(config, *KINDS), out=out, ctx=ctx,
        init=init, tokenizer=init, reference=init if module.NEEDS_REFERENCE else None,
    )  # fmt: skip
    if not any(any(map(stream.grouper, read_jsonl(path))) for path in stream.files()):
        raise CuveeError(
            f"rewards: no prompt of any rollout has completions that differ by more than min_gap {config.min_gap} (or they "
            f"exceed sequence_length {config.sequence_length}), so nothing was learned; sample more completions, or set "
            "with_answer=true"
        )
    blocks = [read_jsonl(path) for path in stream.files()]
    write_jsonl(out / "rollouts.jsonl", [{"block": i, **row} for i, rows in enumerate(blocks) for row in rows])
    first, last = (statistics(rows, config.completions) for rows in (blocks[0], blocks[-1]))
    return metrics | {"reward_first": first["reward"], "reward_last": last["reward"], "contrast": last["contrast"]}


class Rollouts:
    """A Stream of groups sampled by the policy in training."""

    def __init__(self, config: Config, inputs: dict[str, Any], ctx: Context, module: Any):
        from transformers import AutoTokenizer

        from stages.train._groups import Grouper

        self.config, self.ctx, self.init = config, ctx, inputs["init"].path
        self.folder = ctx.scratch / "rollouts"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.reward = inputs["reward"].path if "reward" in inputs else None
        self.tokenizer = AutoTokenizer.from_pretrained(self.init)
        self.prompts = self._fitting(load_prompts(inputs["prompts"], config.mix))
        draws = len(self.files()) * config.prompts_of_block()
        self.drawn = schedule({d: len(rows) for d, rows in self.prompts.items()}, config.mix, draws, config.seed)
        self.grouper = Grouper(
            self.tokenizer, module.GROUP, config.sequence_length, min_gap=config.min_gap,
            behaviour=module.NEEDS_BEHAVIOUR,
        )  # fmt: skip
        self.sampler: Sampler | None = None
        self.current, self.groups = -1, []

    def files(self) -> list[Path]:
        return [self._file(i) for i in range(self.config.block(self.config.steps - 1)[0] + 1)]

    def batch(self, step: int, trainer: Any) -> list:
        from stages.train._groups import epoch_slice

        number, first = self.config.block(step)
        if number != self.current:
            self.groups, self.current = self._block(number, first, trainer), number
        if not self.groups:
            return []
        at = (step - first) * self.config.batch_groups
        order = epoch_slice(len(self.groups), at, self.config.batch_groups, self.config.seed + first)
        return [group for i in order for group in self.groups[i]]

    def _block(self, number: int, first: int, trainer: Any) -> list:
        """Per prompt of the block, its groups (none if its rewards do not tell completions apart)."""
        from stages.trainer.parallel import on_first

        if not on_first(self._file(number).exists):
            self._sample(number, first, trainer)
        rows = read_jsonl(self._file(number))
        groups = [found for found in map(self.grouper, rows) if found]
        if not groups:
            self.ctx.log(
                f"step {first}: none of {len(rows)} prompts tells its completions apart; nothing to learn from"
            )
        return groups

    def _sample(self, number: int, first: int, trainer: Any) -> None:
        """Write the block's rollouts: the first process samples, with what all of them know of the policy."""
        from types import SimpleNamespace

        import numpy as np

        from stages.trainer.batch import Sequence
        from stages.trainer.parallel import on_first

        count = self.config.prompts_of_block()
        prompts = [self.prompts[domain][i] for domain, i in self.drawn[number * count :][:count]]
        probes = [render_prompt(self.tokenizer, p) for p in prompts[:PROBES]]
        groups = [[Sequence(np.array(p, np.int32), np.ones(len(p), np.float32))] for p in probes]
        state, logprobs = trainer.hf_state(), trainer.logprobs(groups)
        policy = SimpleNamespace(hf_state=lambda: state, logprobs=lambda _: logprobs)
        on_first(lambda: write_jsonl(self._file(number), self._rollouts(first, prompts, probes, policy)))

    def _rollouts(self, first: int, prompts: list[dict], probes: list[list[int]], policy: Any) -> list[dict[str, Any]]:
        import time

        began, config = time.monotonic(), self.config
        gap = self._sync(policy, probes)
        rows = self.sampler(prompts, seed=config.seed * 1_000_003 + first)
        rows = [{"version": first, **row} for row in rows]  # optimizer steps behind the weights that sampled
        seconds = time.monotonic() - began
        found = statistics(rows, config.completions)
        tokens = sum(len(t) for row in rows for t in row["tokens"][: config.completions])
        values = {f"rollout/{k}": v for k, v in found.items()} | {"rollout/parity": gap}
        self.ctx.metrics(first, **values, **{"rollout/tokens_per_second": tokens / seconds})
        self.ctx.log(
            f"step {first}: {tokens} tokens of {len(prompts)} prompts in {seconds:.1f} s, reward {found['reward']:.3f}"
        )
        return rows

    def _sync(self, policy: Any, probes: list[list[int]]) -> float:
        """Bring the policy's weights to the engine and probe that both give the same log-probabilities (nats)."""
        engines = resolve("rollout/engines", self.config.engine)
        state = policy.hf_state()
        if self.sampler is None:
            self.sampler = Sampler(self.config, engines.Engine(self.init, self.ctx, state), self.ctx, self.reward)
        else:
            self.sampler.engine.sync_weights(state)
        half = self.config.precision_at(0) != "fp32"
        threshold = HALF_THRESHOLD if half else engines.PROBE_THRESHOLD
        return engines.parity(self.sampler.engine, policy, probes, threshold)

    def _fitting(self, prompts: dict[str, list[dict]]) -> dict[str, list[dict]]:
        longest = self.config.sequence_length - self.config.max_new_tokens
        fits = lambda p: len(render_prompt(self.tokenizer, p)) <= longest  # noqa: E731
        found = {domain: [p for p in rows if fits(p)] for domain, rows in prompts.items()}
        for domain, rows in found.items():
            if not rows:
                raise CuveeError(
                    f"sequence_length: no prompt of {domain} is within {longest} tokens (sequence_length - "
                    f"max_new_tokens); raise it or leave the domain out of mix"
                )
            if len(rows) < len(prompts[domain]):
                self.ctx.log(
                    f"{domain}: {len(prompts[domain]) - len(rows)} prompts are longer than {longest} tokens; left out"
                )
        return found

    def _file(self, number: int) -> Path:
        return self.folder / f"block-{number:06d}.jsonl"
