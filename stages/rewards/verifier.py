"""The programmatic reward: each prompt's own domain verifier on the response, in [-1, 1]."""

from typing import Any

from stages.rewards._common import Checked
from stages.stage import resolve


class Reward(Checked):
    def scores(self, prompts: list[dict[str, Any]], texts: list[str]) -> list[float | None]:
        found: list[float | None] = [None] * len(texts)
        for domain in {prompt["domain"] for prompt in prompts}:
            task = resolve("tasks", domain)
            chosen = [i for i, prompt in enumerate(prompts) if prompt["domain"] == domain]
            if hasattr(task, "verify_batch"):
                scores = task.verify_batch([prompts[i] for i in chosen], [texts[i] for i in chosen])
            else:
                scores = [task.verify(prompts[i], texts[i]) for i in chosen]
            for i, score in zip(chosen, scores, strict=True):
                found[i] = score
        return found
