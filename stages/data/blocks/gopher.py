"""Gopher's quality rules for prose (arXiv 2112.11446, table A1), with datatrove's definitions and thresholds.

Words are those of stages/data/words.py. Text in scripts without spaces is asked neither for the length of its words nor
for function words; other languages are asked for their own.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from stages.data.blocks.quality import STOP_WORDS
from stages.data.blocks.repetition import spaceless
from stages.data.document import Document
from stages.data.thresholds import at_least, at_most
from stages.data.words import cut

HEAD = 600  # characters of a text searched for function words before the rest is
EDGES = ".,;:!?()[]\"'«»“”„¿¡…*_"


@dataclass
class Config:
    min_words: int = at_least(50, "fewest words (characters in Chinese, Japanese, Thai)")
    max_words: int = at_most(100_000, "most words")
    min_mean_length: float = at_least(3.0, "smallest mean length of a word, in characters")
    max_mean_length: float = at_most(10.0, "largest mean length of a word, in characters")
    max_symbols: float = at_most(0.1, "most # and most ellipses, a word")
    max_bullets: float = at_most(0.9, "largest share of lines that begin with a bullet")
    max_ellipses: float = at_most(0.3, "largest share of lines that end with an ellipsis")
    min_alphabetic: float = at_least(0.8, "smallest share of words with a letter; punctuation marks count as words")
    min_stop_words: int = at_least(2, "fewest different function words of the language")


def filter(documents: list[Document], config: Config) -> list[str]:
    """A reason to remove each document, or "". Only prose is judged."""
    chosen = [document for document in documents if document.domain == "prose"]
    reasons = {id(document): f"number of words: too many in {len(document.text)} characters" for document in chosen}
    for words, rows, places in cut([document.text for document in chosen]):
        total, real, letters = (words.count(values)[rows] for values in (words.lengths > 0, words.is_word, words.has_letter))
        mean = words.count(words.lengths * words.is_word)[rows] / np.maximum(real, 1)
        for place, *counts in zip(places, total.tolist(), real.tolist(), letters.tolist(), mean.tolist(), strict=True):
            reasons[id(chosen[place])] = _reason(chosen[place], *counts, config)
    return [reasons.get(id(document), "") for document in documents]


def _reason(document: Document, total: int, real: int, letters: int, mean: float, config: Config) -> str:
    text, spaced = document.text, not spaceless(document.text)
    if not config.min_words <= real <= config.max_words:
        return f"number of words: {real}"
    if spaced and not config.min_mean_length <= mean <= config.max_mean_length:
        return f"mean word length: {mean:.1f}"
    if (marks := max(text.count("#"), text.count("...") + text.count("…"))) > config.max_symbols * total:
        return f"symbols: {marks} in {total} words"
    lines = text.splitlines()
    bullets = ellipses = 0  # counted only where there are marks enough
    if text.count("-") + text.count("•") > config.max_bullets * len(lines):
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    if text.count("...") + text.count("…") > config.max_ellipses * len(lines):
        ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    if bullets > config.max_bullets * len(lines) or ellipses > config.max_ellipses * len(lines):
        return f"lines: {bullets} bullets, {ellipses} ellipses of {len(lines)}"
    if letters < config.min_alphabetic * total:
        return f"words without letters: {1 - letters / total:.0%}"
    if spaced and (stops := _stop_words(document.language or "en")):
        found = _found(text[:HEAD], stops)
        if found < config.min_stop_words and (found := _found(text, stops)) < config.min_stop_words:
            return f"function words: {found}"
    return ""


@cache
def _stop_words(language: str) -> frozenset[str]:
    return frozenset(STOP_WORDS.get(language, "").split())


def _found(text: str, stops: frozenset[str]) -> int:
    """Different function words in a text."""
    return len(stops.intersection(word.strip(EDGES) for word in text.lower().split()))
