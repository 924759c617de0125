"""The final answer, for prompts with `check.number` (a whole number) or `check.value` (a LaTeX expression): 1 right, 0 wrong,
-0.5 without any. Values are compared by math-verify, so that 1/2, 0.5 and \\frac{2}{4} are one answer."""

from typing import Any

from stages.rewards._common import Checked
from stages.tasks import math


class Reward(Checked):
    @staticmethod
    def applies(prompt: dict[str, Any]) -> bool:
        return bool({"number", "value"} & set(prompt["check"]))

    def score(self, prompt: dict[str, Any], text: str) -> float:
        return math.verify(prompt, text)
