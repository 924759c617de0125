"""Citations and grounding, for prompts with something to cite: documents (of the chat template, or numbered lines of the last user
turn) or results of tools. In [-1, 1]:

-1 for a citation of a source that does not exist or does not hold the span's words; else, where `check` names the source
(`source`, -1 for none, or `cites`), the F1 of the cited sources with it; else 1 with a citation and 0 without. Silence is -1.
A turn that is to call tools (`calls`) is not judged."""

import re
from typing import Any

from stages.chat.messages import answered, said
from stages.rewards._common import Checked
from stages.tasks._common import holds, plain
from stages.tasks.rag import citations

Sources = dict[tuple[int, int], str]  # (call, result) -> its text


class Reward(Checked):
    @staticmethod
    def applies(prompt: dict[str, Any]) -> bool:
        return "calls" not in prompt["check"] and bool(sources(prompt))

    def score(self, prompt: dict[str, Any], text: str) -> float:
        if not plain(text):
            return -1.0
        held, found = sources(prompt), citations(text)
        told = lambda source, span: bool(span) and holds(plain(held.get(source, "")), span)  # noqa: E731
        if not all(told(source, plain(span)) for span, cited in found for source in cited):
            return -1.0
        given = {source for _, cited in found for source in cited}
        expected = _expected(prompt["check"])
        if expected is None or not given or not expected:
            return float(bool(given) == (expected is None or bool(expected)))
        return 2 * len(given & expected) / (len(given) + len(expected))


def _expected(check: dict[str, Any]) -> set[tuple[int, int]] | None:
    if "cites" in check:
        return {tuple(check["cites"])} if check["cites"] else set()
    return {(0, check["source"])} - {(0, -1)} if "source" in check else None


def sources(prompt: dict[str, Any]) -> Sources:
    """What a completion of the prompt may cite, by the number of its call and of its result."""

    words = lambda value: said({"content": value})  # noqa: E731
    found: Sources = {(0, i): words(document) for i, document in enumerate(prompt.get("documents") or [])}
    turns, calls = prompt["messages"], iter(answered(prompt))
    for turn in turns:
        if turn["role"] == "tool" and (call := next(calls, None)) is not None:
            results = turn["content"] if isinstance(turn["content"], list) else [turn["content"]]
            found |= {(call, i): words(result) for i, result in enumerate(results)}
        elif turn["role"] == "user":
            for number, line in re.findall(r"^Observation (\d{1,4}): (.*)$", said(turn), re.MULTILINE):
                found |= {(int(number), i): text.strip() for i, text in enumerate(re.split(r"\[\d+\] ", line)[1:])}
    if not found and turns:
        found = {(0, int(n)): text for n, text in re.findall(r"^\[(\d{1,4})\] (.+)$", said(turns[-1]), re.MULTILINE)}
    return found
