"""FineWeb's additional rules for web pages (arXiv 2406.17557, section 3.6), with datatrove's definitions.

A line of Chinese, Japanese or Thai says in ten characters what takes thirty in English; there, a line is short below a
third of the length. Languages that mark no end of a sentence are not asked for marks.
"""

from dataclasses import dataclass

from stages.data.blocks.c4 import UNMARKED
from stages.data.blocks.repetition import spaceless
from stages.data.document import Document
from stages.data.thresholds import at_least, at_most
from stages.data.words import cut
from stages.stage import option

STOPS = tuple(".!?。！？．؟۔।॥။۔｡…")


@dataclass
class Config:
    min_ended: float = at_least(0.12, "smallest share of lines that end with a sentence's mark")
    short_line: int = option(30, "characters of a short line")
    max_short: float = at_most(0.67, "largest share of short lines")
    max_duplicates: float = at_most(0.01, "largest share of characters in lines that occurred before")
    max_lines: float = at_most(0.3, "most line ends, a word")


def filter(documents: list[Document], config: Config) -> list[str]:
    """A reason to remove each document, or "". Only prose is judged."""
    reasons = [_lines(document, config) if document.domain == "prose" else "" for document in documents]
    # A text has at least as many words as spaces part it into: only the others are cut into words.
    unsure = [i for i, document in enumerate(documents) if document.domain == "prose" and not reasons[i]
              and document.text.count("\n") > config.max_lines * len(document.text.split())]
    for words, rows, places in cut([documents[i].text for i in unsure]):
        for row, place in zip(rows.tolist(), places, strict=True):
            ends, count = documents[unsure[place]].text.count("\n"), int(words.first[row + 1] - words.first[row])
            if ends > config.max_lines * count:
                reasons[unsure[place]] = f"list: {ends} line ends in {count} words"
    return reasons


def _lines(document: Document, config: Config) -> str:
    text = document.text
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    if not lines:
        return "empty"
    ended = sum([line.endswith(STOPS) for line in lines])
    if document.language not in UNMARKED and ended < config.min_ended * len(lines):
        return f"lines without an end: {len(lines) - ended} of {len(lines)}"
    limit = config.short_line // 3 if spaceless(text) else config.short_line
    if (short := sum([len(line) <= limit for line in lines])) > config.max_short * len(lines):
        return f"short lines: {short} of {len(lines)}"
    if len(set(lines)) < len(lines):
        seen: set[str] = set()
        again = sum(len(line) for line in lines if line in seen or seen.add(line))
        if again > config.max_duplicates * (len(text) - text.count("\n")):
            return f"repeated lines: {again} of {len(text)} characters"
    return ""
