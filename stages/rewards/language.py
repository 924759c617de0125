"""The response's language, for prompts with `check.language` (ISO 639-1): 1 when py3langid finds it, -1 when it finds another.
A response of fewer than 20 letters is not judged where the prompt's own answer is as short, or unknown: names and numbers of one
or two words belong to many languages. Elsewhere, and without a letter, it is -1 too: a way out of being judged is none."""

from typing import Any

from stages.rewards._common import Checked
from stages.tasks._constraints import language_of


class Reward(Checked):
    @staticmethod
    def applies(prompt: dict[str, Any]) -> bool:
        return bool(prompt["check"].get("language"))

    def score(self, prompt: dict[str, Any], text: str) -> float | None:
        found = language_of(text)
        if found:
            return 1.0 if found == prompt["check"]["language"] else -1.0
        return -1.0 if language_of(prompt.get("answer") or "") or not any(map(str.isalpha, text)) else None
