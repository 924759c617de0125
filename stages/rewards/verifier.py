"""The programmatic reward: each prompt's own domain verifier on the response, in [-1, 1]."""

from __future__ import annotations

from pathlib import Path

from stages.chat.render import response
from stages.stage import Context, resolve


class Reward:
    """rewards[i][j]: how right `completions[i][j]` is as an answer to `prompts[i]`."""

    def __init__(self, ctx: Context | None = None, model: Path | None = None):
        self.ctx = ctx

    def __call__(self, prompts: list[dict], completions: list[list[str]]) -> list[list[float]]:
        flat = [(prompt, response(text)) for prompt, texts in zip(prompts, completions, strict=True) for text in texts]
        scores = [0.0] * len(flat)
        for domain in sorted({prompt["domain"] for prompt, _ in flat}):
            task = resolve("tasks", domain)
            chosen = [i for i, (prompt, _) in enumerate(flat) if prompt["domain"] == domain]
            if hasattr(task, "verify_batch"):
                found = task.verify_batch([flat[i][0] for i in chosen], [flat[i][1] for i in chosen])
            else:
                found = [task.verify(*flat[i]) for i in chosen]
            for i, score in zip(chosen, found, strict=True):
                scores[i] = score
        rest = iter(scores)
        return [[next(rest) for _ in texts] for texts in completions]
