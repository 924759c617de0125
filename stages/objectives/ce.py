"""Cross-entropy: the negative log-likelihood of the target tokens, averaged over all of them (pretraining, SFT)."""

from dataclasses import dataclass

from stages.trainer.batch import Loss, Packed

GROUP = "single"
NEEDS_REFERENCE = False
NEEDS_SCORES = False
NEEDS_BEHAVIOUR = False
COUNT = "tokens"


@dataclass
class Config:
    pass


def loss(batch: Packed, config: Config) -> Loss:
    """Sum of -mask_t log p(token_t) in nats; count = sum of mask. The mask may be fractional: a weight of a token."""
    return Loss(-(batch.logprobs * batch.mask).sum(), batch.mask.sum(), {})
