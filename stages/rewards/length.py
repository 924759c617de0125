"""A penalty on length: 0 up to the reference answer's length, then falling in a line to -1 at four times that length.

The shape is DAPO's soft overlong punishment with the budget taken from each prompt's own answer, in characters; 40
characters are always free.
"""

from typing import Any

from stages.rewards._common import Checked


class Reward(Checked):
    def score(self, prompt: dict[str, Any], text: str) -> float:
        free = max(40, len(prompt["answer"]))
        return -min(1.0, max(0.0, (len(text) - free) / (3 * free)))
