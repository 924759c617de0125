"""Instructions followed, for prompts with `check.constraints` (IFEval's types: stages/tasks/_constraints.py): the share of them, by
the strict measure, in [0, 1]."""

from typing import Any

from stages.rewards._common import Checked
from stages.tasks._constraints import followed


class Reward(Checked):
    @staticmethod
    def applies(prompt: dict[str, Any]) -> bool:
        return bool(prompt["check"].get("constraints"))

    def score(self, prompt: dict[str, Any], text: str) -> float:
        found = followed(prompt["check"]["constraints"], text)
        return sum(found) / len(found)
