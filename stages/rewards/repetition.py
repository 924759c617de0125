"""A penalty on loops: minus the share of a response's word 3-grams that have occurred before in it, in [-1, 0]."""

from __future__ import annotations

from pathlib import Path

from stages.chat.render import response
from stages.stage import Context


class Reward:
    def __init__(self, ctx: Context | None = None, model: Path | None = None):
        self.ctx = ctx

    def __call__(self, prompts: list[dict], completions: list[list[str]]) -> list[list[float]]:
        return [[_repeated(response(text)) for text in texts] for texts in completions]


def _repeated(text: str) -> float:
    words = text.split()
    grams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return len(set(grams)) / len(grams) - 1.0 if grams else 0.0
