"""A penalty on loops: minus the share of a response's word 3-grams that have occurred before in it, in [-1, 0]."""

from typing import Any

from stages.rewards._common import Checked


class Reward(Checked):
    def score(self, prompt: dict[str, Any], text: str) -> float:
        words = text.split()
        grams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0
