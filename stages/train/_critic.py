"""The value network of PPO: a second trainer, whose values make the advantages of a block's completions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from stages.stage import CuveeError
from stages.trainer.batch import Group, Loss, Packed, Sequence
from stages.trainer.parallel import on_first


@dataclass
class Critic:
    """What train.rl gives the training loop of it. init: folder of the first weights, a reward model or a policy.
    module: the objective; options: its configuration."""

    init: Path
    module: Any
    options: Any

    def objective(self, batch: Packed) -> Loss:
        return self.module.value_loss(batch, self.options)


class Criticised:
    """A Stream that gives the groups of Rollouts their advantages, and trains the value network on their returns.

    Values are those of the network when the block began, as the rollouts are the policy's of then: that is what the
    clipping of values is measured from. They lie beside the rollouts, so that a run which resumes within a block finds them.
    """

    def __init__(self, stream: Any, critic: Critic, config: Any, ctx: Any):
        self.stream, self.critic, self.config, self.ctx = stream, critic, config, ctx
        self.block, self.values, self.streak = -1, {}, 0
        self.folder = ctx.scratch / "rollouts"
        self.folder.mkdir(parents=True, exist_ok=True)

    def batch(self, step: int, trainer: Any) -> list[Group]:
        groups = self.stream.batch(step, trainer)
        if not groups:
            return groups
        groups = self._judged(groups, trainer)
        lr = self.critic.options.value_lr * self.config.learning_rate(step)
        found = trainer.critic.step(groups, lr)
        self.streak = self.streak + 1 if found["skipped"] else 0
        if self.streak > self.config.max_skipped:
            raise CuveeError(
                f"max_skipped: the value network's loss or its gradient was NaN or infinite in {self.streak} steps in a row, the "
                f"last one {step + 1}; lower options.value_lr"
            )
        if dist.get_rank() == 0:
            told = {f"value/{name}": found[name] for name in ("loss", "grad_norm", "skipped", "value_clipped") if name in found}
            self.ctx.metrics(step, **told, **self._fit(groups))
        return [] if step < self.critic.options.value_steps else groups

    def _judged(self, groups: list[Group], trainer: Any) -> list[Group]:
        """The groups with token_fields advantage (whitened over all), value and return."""
        module, options = self.critic.module, self.critic.options
        if self.block != self.stream.current:
            self.block, self.values = self.stream.current, self._values(trainer)
        references, flat = trainer.reference_logprobs(groups), [sequence for group in groups for sequence in group]
        values = [self.values[id(sequence)] for sequence in flat]
        made = []
        for sequence, reference, value in zip(flat, references, values, strict=True):
            at = np.flatnonzero(sequence.mask[1:])
            reward = -options.beta * (sequence.behaviour[1:].astype(np.float64) - reference)[at]
            reward[-1:] += sequence.fields["reward"]
            made.append((at + 1, value[at].astype(np.float64), *module.estimate(reward, value[at].astype(np.float64), options)))
        advantages = module.whitened([advantage for _, _, advantage, _ in made])
        judged = iter([
            replace(sequence, token_fields={
                "advantage": _placed(sequence, at, own), "value": _placed(sequence, at, value), "return": _placed(sequence, at, aim)
            })
            for sequence, (at, value, _, aim), own in zip(flat, made, advantages, strict=True)
        ])  # fmt: skip
        return [[next(judged) for _ in group] for group in groups]

    def _values(self, trainer: Any) -> dict[int, np.ndarray]:
        """The values of each sequence of the block (by its id), of the network as it was at the block's first step."""
        groups = [group for found in self.stream.groups for group in found]
        flat = [sequence for group in groups for sequence in group]
        # By the tokens, for a block that another host has sampled anew has other values.
        digest = hashlib.sha256(b"".join(sequence.tokens.tobytes() for sequence in flat)).hexdigest()[:16]
        file = self.folder / f"block-{self.stream.current:06d}-{digest}.npz"
        if not on_first(file.exists):
            values, part = trainer.critic.values(groups), file.with_suffix(".part")

            def write() -> None:
                with open(part, "wb") as out:
                    np.savez(out, *values)
                part.replace(file)

            on_first(write)
        with np.load(file) as saved:
            return {id(sequence): saved[f"arr_{i}"] for i, sequence in enumerate(flat)}

    @staticmethod
    def _fit(groups: list[Group]) -> dict[str, float]:
        """Mean value, and the share of the returns' variance that the values of the block explain."""
        flat = [sequence for group in groups for sequence in group]
        take = lambda name: np.concatenate([s.token_fields[name][s.mask > 0] for s in flat])  # noqa: E731
        value, aim = take("value"), take("return")
        return {"value/mean": value.mean(), "value/explained": 1 - (aim - value).var() / max(aim.var(), 1e-12)}


def _placed(sequence: Sequence, at: np.ndarray, values: np.ndarray) -> np.ndarray:
    """float32 [T]: `values` at the tokens `at`, 0 elsewhere."""
    found = np.zeros(len(sequence.tokens), np.float32)
    found[at] = values
    return found
