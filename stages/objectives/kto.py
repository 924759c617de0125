"""Kahneman-Tversky optimisation (Ethayarajh et al., arXiv 2402.01306, eq. 7): single completions, good or bad.

With h(y) = log pi(y|x)/pi_ref(y|x) (token sums) and the baseline z = max(0, KL):

    desirable:  l = w_d (1 - s(beta (h - z)))        undesirable:  l = w_u (1 - s(beta (z - h)))

z is the mean of h over mismatched pairs, prompts with completions of other prompts, over the whole batch of a step and
without gradient: `prepare` computes it before the step, so that it depends on no microbatch or rank.
A group is the completions of one prompt, each of which counts by itself; field `reward`: above `threshold` a
completion is desirable. Field `baseline` is z.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stages.objectives._common import filled, log_ratio, within
from stages.stage import option
from stages.trainer.batch import Group, Loss, Packed, Sequence

GROUP = "completions"
NEEDS_REFERENCE = True
NEEDS_SCORES = False
NEEDS_BEHAVIOUR = False
COUNT = "sequences"


@dataclass
class Config:
    beta: float = option(0.1, "strength of the pull to the reference model")
    threshold: float = option(0.0, "a completion rewarded more is desirable, any other undesirable")
    desirable_weight: float = option(1.0, "w_d; w_d times the desirable should be 1 to 4/3 of w_u times the others")
    undesirable_weight: float = option(1.0, "w_u")

    def check(self) -> None:
        within(self, "desirable_weight", "undesirable_weight")


def prepare(groups: list[Group], trainer: Any) -> list[Group]:
    """The groups of a step, with z in every sequence's field `baseline` (0 where the step has a single prompt)."""
    z = 0.0
    if len(groups) > 1:
        mixed = mismatched(groups)
        ratios = zip(trainer.logprobs(mixed), trainer.reference_logprobs(mixed), mixed, strict=True)
        z = max(0.0, float(np.mean([np.dot(ours - theirs, group[0].mask[1:]) for ours, theirs, group in ratios])))
    return [[replace(s, fields={**s.fields, "baseline": z}) for s in group] for group in groups]


def mismatched(groups: list[Group]) -> list[Group]:
    """Each sequence's prompt (its tokens before the first target) with a completion of the next group, cut to the
    length of the longest sequence."""
    longest = max(len(s.tokens) for group in groups for s in group)
    found = []
    for group, other in zip(groups, [*groups[1:], groups[0]], strict=True):
        for i, own in enumerate(group):
            theirs = other[i % len(other)]
            prompt, rest = own.tokens[: start(own)], slice(start(theirs), None)
            tokens = np.concatenate([prompt, theirs.tokens[rest]])[:longest]
            mask = np.concatenate([np.zeros(len(prompt), np.float32), theirs.mask[rest]])[:longest]
            found.append([Sequence(tokens, mask, own.fields)])
    return found


def start(sequence: Sequence) -> int:
    return int(np.argmax(sequence.mask > 0))


def loss(batch: Packed, config: Config) -> Loss:
    """Sum over sequences with targets; count = these sequences.

    Metrics: baseline (z), reward, desirable (share), and by kind: desirable_ratio, undesirable_ratio (h).
    """
    part, h = filled(batch).to(batch.logprobs), log_ratio(batch)
    reward, z = batch.fields["reward"].to(h), batch.fields["baseline"].to(h)
    good = (reward > config.threshold).to(h)
    sign = 2 * good - 1
    weight = config.desirable_weight * good + config.undesirable_weight * (1 - good)
    terms = weight * (config.beta * sign * (z - h)).sigmoid() * part
    mean = lambda values, over: ((values.detach() * over).sum(), over.sum())  # noqa: E731
    metrics = {
        "baseline": mean(z, part),
        "reward": mean(reward, part),
        "desirable": mean(good, part),
        "desirable_ratio": mean(h, good * part),
        "undesirable_ratio": mean(h, (1 - good) * part),
    }
    return Loss(terms.sum(), part.sum(), metrics)
