"""What the rewards share: they judge responses one by one, those of prompts of which they have something to say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.chat.render import response
from stages.stage import Context, CuveeError, resolve


class Checked:
    """A reward of the prompts that `applies` names; others get None, which leaves it out of their sum.

    A subclass defines `score` (or `scores`, where many at once are cheaper), and `applies` where it is not for all prompts.
    """

    def __init__(self, ctx: Context | None = None, model: Path | None = None):
        """What every reward is made with; none of these needs it."""

    @staticmethod
    def applies(prompt: dict[str, Any]) -> bool:
        """Whether the reward has anything to say of this prompt's completions."""
        return True

    def score(self, prompt: dict[str, Any], text: str) -> float | None:
        """The reward of one response, None where even this prompt's can't be judged."""
        raise NotImplementedError

    def scores(self, prompts: list[dict[str, Any]], texts: list[str]) -> list[float | None]:
        return [self.score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]

    def __call__(self, prompts: list[dict[str, Any]], completions: list[list[str]]) -> list[list[float | None]]:
        """The reward of each completion (raw text), in the shape of `completions`; None where it does not apply."""
        flat = [
            (p, response(t)) for p, texts in zip(prompts, completions, strict=True) if self.applies(p) for t in texts
        ]
        found = iter(self.scores([p for p, _ in flat], [t for _, t in flat]))
        return [
            [next(found) if self.applies(p) else None for _ in texts]
            for p, texts in zip(prompts, completions, strict=True)
        ]


def refuse_idle(names: list[str], prompts: list[dict[str, Any]]) -> None:
    """Raises CuveeError when one of the rewards applies to none of the prompts: its weight would do nothing."""
    for name in names:
        applies = getattr(resolve("rewards", name).Reward, "applies", None)
        if applies and prompts and not any(map(applies, prompts)):
            domains = ", ".join(sorted({p.get("domain", "?") for p in prompts}))
            raise CuveeError(f"rewards: {name} applies to none of the {len(prompts)} prompts of {domains} (see stages/rewards/{name}.py "
                             f"for what it needs); take it out, or give prompts that have it")  # fmt: skip
