"""What every engine gives, and the probe after a sync: does it compute with the trainer's weights what the trainer does?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.stage import CuveeError

if TYPE_CHECKING:
    import torch


@dataclass
class Completion:
    """ids: the sampled tokens, the stop token included if it came. text: the same without it, special tokens shown.
    logprobs: nats of each id under the model (temperature 1), as the trainer would compute them."""

    ids: list[int]
    text: str
    logprobs: list[float]


def parity(engine: Any, sequences: list[list[int]], logprobs: list[np.ndarray], weights: Any) -> float:
    """Largest difference in nats between the engine's log-probabilities of `sequences` and the trainer's `logprobs`.

    weights: the trainer's, as the engine's `sync_weights` takes them. Raises CuveeError above the engine's threshold, or
    where a weight that the engine can show is not the trainer's, and names the tensor group that differs most.
    """
    gaps = [ours - theirs for ours, theirs in zip(engine.logprobs(sequences), logprobs, strict=True)]
    worst = float(np.abs(np.concatenate(gaps)).max())
    wrong = engine.differences(weights)
    if worst <= engine.threshold and not wrong:
        return worst
    far = f"its log-probabilities differ from the trainer's by {worst:.3g} nats (allowed {engine.threshold:g})"
    if wrong:
        group = max(wrong, key=lambda name: wrong[name])
        raise CuveeError(
            f"rollout engine: after sync_weights the tensor group {group} differs most (by {wrong[group]:.3g}) from the "
            f"trainer's, and {far}; the weights were corrupted on the way"
        )
    if wrong is None:
        raise CuveeError(
            f"rollout engine: {far} after sync_weights; it shows no weights, so that either they were corrupted on the way, or "
            "the two forward passes disagree: look into the server's log, then check its model configuration and precision"
        )
    raise CuveeError(
        f"rollout engine: {far} after sync_weights; all of its weights are equal, so the two forward passes disagree: check "
        "the model configuration of either side, and the engine's precision"
    )


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference in each tensor group (a layer's attention, its MLP, a norm, the embedding) that has one; `theirs`
    rounded as `ours` are."""
    import torch

    groups: dict[str, float] = {}
    for name, tensor in theirs.items():
        mine = ours[name]
        expected = tensor.to(mine.device, mine.dtype)
        if not torch.equal(mine, expected):
            group = name.removeprefix("model.").rsplit(".", 2 if ".layers." in name and "norm" not in name else 1)[0]
            gap = float((mine.float() - expected.float()).abs().nan_to_num(nan=torch.inf).max())
            groups[group] = max(groups.get(group, 0.0), gap)
    return groups
