"""Distillation (Hinton et al., arXiv 1503.02531): forward KL to a teacher's k likeliest tokens, mixed with label CE.

With q the teacher's probabilities of its k likeliest tokens at a target, scaled to sum to 1, and y the label:

    l = weight sum_k q_k (log q_k - log pi(k)) + (1 - weight) (-log pi(y))

With k = 1 and weight 0.9 that is the mix of Apple's on-device model (arXiv 2407.21075: the teacher's top token and the
label). At temperature 1 alone: the trainer gives log-probabilities, not logits.
`Packed.teacher` is log q before scaling; the output layer is computed once for each of a place's k + 1 targets, so k is
small. A group is one sequence.
"""

from dataclasses import dataclass

from stages.objectives._common import within
from stages.stage import option
from stages.trainer.batch import Loss, Packed

GROUP = "single"
NEEDS_REFERENCE = False
NEEDS_SCORES = False
NEEDS_BEHAVIOUR = False
COUNT = "tokens"


@dataclass
class Config:
    weight: float = option(0.9, "of the teacher's distribution, 0 to 1; the labels have the rest")

    def check(self) -> None:
        within(self, "weight", most=1)


def loss(batch: Packed, config: Config) -> Loss:
    """Sum over places in nats; count = sum of the places' mask. Metrics: kl and ce, the two terms unweighted."""
    places, k = batch.teacher.shape
    logprobs, mask = batch.logprobs.view(places, k + 1), batch.mask.view(places, k + 1)[:, 0]
    log_q = batch.teacher.log_softmax(1)
    kl = (log_q.exp() * (log_q - logprobs[:, :k])).sum(1)
    ce = -logprobs[:, k]
    terms = config.weight * kl + (1 - config.weight) * ce
    metrics = {"kl": (kl.detach() * mask).sum(), "ce": (ce.detach() * mask).sum()}
    return Loss((terms * mask).sum(), mask.sum(), metrics)
