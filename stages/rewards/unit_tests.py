"""Unit tests in the sandbox, for prompts with `check.tests` (see stages/tasks/code.py for their form): the fraction passed,
-1 without a code block, in [-1, 1]."""

from typing import Any

from stages.rewards._common import Checked
from stages.tasks import code


class Reward(Checked):
    @staticmethod
    def applies(prompt: dict[str, Any]) -> bool:
        return "tests" in prompt["check"]

    def scores(self, prompts: list[dict[str, Any]], texts: list[str]) -> list[float | None]:
        return list(code.verify_batch(prompts, texts))
