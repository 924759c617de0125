"""A penalty on length: 0 up to the reference answer's length, then falling in a line to -1 at four times that length.

The shape is DAPO's soft overlong punishment with the budget taken from each prompt's own answer, in characters; 40
characters are always free.
"""

from __future__ import annotations

from pathlib import Path

from stages.chat.render import response
from stages.stage import Context


class Reward:
    def __init__(self, ctx: Context | None = None, model: Path | None = None):
        self.ctx = ctx

    def __call__(self, prompts: list[dict], completions: list[list[str]]) -> list[list[float]]:
        return [
            [_penalty(len(response(text)), max(40, len(prompt["answer"]))) for text in texts]
            for prompt, texts in zip(prompts, completions, strict=True)
        ]


def _penalty(length: int, free: int) -> float:
    return -min(1.0, max(0.0, (length - free) / (3 * free)))
