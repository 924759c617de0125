"""Soft overlong punishment (Yu et al., DAPO, arXiv 2503.14476, eq. 13), in tokens of the completion, in [-1, 0].

    0 if L <= L_max - L_cache;    ((L_max - L_cache) - L) / L_cache up to L_max;    -1 above

L_max is the stage's `max_new_tokens`, at which a completion is cut off, and L_cache a fifth of it, as in DAPO (4096 of
20480).
"""

from stages.rewards._common import Checked

CACHE = 0.2  # share of the longest completion in which the punishment grows


class Reward(Checked):
    def of_tokens(self, completions: list[list[list[int]]], max_new_tokens: int) -> list[list[float]]:
        """The reward of each completion, given as token ids."""
        return [[penalty(len(ids), max_new_tokens, CACHE * max_new_tokens) for ids in row] for row in completions]


def penalty(length: int, longest: float, cache: float) -> float:
    return max(-1.0, min(0.0, (longest - cache - length) / cache))
