"""What the task files share: the shape of a prompt, and the reading of numbers and sentences."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import Any

from stages.chat.template import SPECIAL_TOKENS


def prompt(user: str, answer: str, check: dict[str, Any], system: str = "", **extra: Any) -> dict[str, Any]:
    """A line of a PROMPTS artifact, but for its id and domain. check: what the domain's `verify` needs."""
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": [*messages, {"role": "user", "content": user}], "answer": answer, "check": check, **extra}


def draw(rng: random.Random, names: list[str]) -> str:
    """One of the names; a single one takes nothing from the generator."""
    return rng.choice(names) if len(names) > 1 else names[0]


def numbers(text: str) -> list[int | float]:
    """The numbers in a text, in order: whole ones, and such as 2.5; thousands may be separated by commas, a sign must touch its digits."""
    found = re.findall(r"((?<![\w.])-?\d{1,3}(?:,\d{3})+\b|-?\d{1,18})(\.\d{1,18})?", text)
    return [float(f"{n}{part}".replace(",", "")) if part.strip(".0") else int(n.replace(",", "")) for n, part in found]


def plain(text: str) -> str:
    """For comparing short answers: NFKC, one case, no quotes or punctuation at the ends, single spaces."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" .,;:!?\"'`“”„«»「」。")


def holds(text: str, words: str) -> bool:
    """Whether the words stand in the text, not inside longer ones."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


@cache
def language_names() -> dict[str, str]:
    """The languages' English names by ISO 639-1 code, from CLDR."""
    from babel import Locale

    return dict(Locale("en").languages)


def sentences(documents: list[dict], rng: random.Random, shortest: int = 30, longest: int = 200) -> list[str]:
    """Sentences of the prose among the documents (of all of them where none is prose), in an order that rng decides."""
    texts = [d["text"] for d in documents if d.get("domain") == "prose"] or [d["text"] for d in documents]
    found = []
    for text in rng.sample(texts, min(len(texts), 400)):
        for line in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
            line = " ".join(line.split())
            if shortest <= len(line) <= longest and line[-1] in ".!?" and not any(t in line for t in SPECIAL_TOKENS):
                found.append(line)
    rng.shuffle(found)
    return found


def json_in(text: str) -> Iterator[Any]:
    """The JSON objects and arrays in a text, one after another."""
    bracket, at = re.compile(r"[\[{]"), 0
    while found := bracket.search(text, at):
        try:
            value, at = json.JSONDecoder().raw_decode(text, found.start())
            yield value
        except (ValueError, RecursionError):
            at = found.end()
