"""C4's rules for web pages (arXiv 1910.10683, section 2.2), with datatrove's definitions: lines go, then pages.

Lines must end a sentence, have words enough, and name neither JavaScript nor a policy; pages must keep sentences enough
and hold no curly bracket or placeholder text. Sentences end as the language writes it: 。 in Chinese and Japanese, ؟ in
Arabic and Persian, । in Hindi; where a script marks no end (Thai, Lao, Khmer, Myanmar) no line is asked for one.
"""

import re
from dataclasses import dataclass

from stages.data.blocks.repetition import spaceless
from stages.data.document import Document
from stages.data.thresholds import at_least, at_most
from stages.stage import option

CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
ENDS = (".", "?", "!", '"', "'", "。", "？", "！", "」", "』", "؟", "۔", "।", "॥", "”", "…")
LATIN_ENDS = (".", "?", "!", '"', "'")
UNMARKED = {"th", "lo", "km", "my"}  # languages that end a sentence with a space
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies", "javascript")
SENTENCE = re.compile(r"[.!?]+(?=[^\w\s.!?]*(?:\s|$))|[。！？؟۔।॥]+")


@dataclass
class Config:
    min_sentences: int = at_least(5, "fewest sentences of a page, after its lines were chosen")
    min_words: int = at_least(3, "fewest words of a line; three times as many characters in scripts without spaces")
    max_word: int = at_most(1000, "longest word of a line, in characters")
    curly_brackets: bool = option(False, "keep pages with a curly bracket")


def clean(document: Document, config: Config) -> str:
    """Drops lines in place; a reason to remove the document, or "". Only prose is judged."""
    if document.domain != "prose":
        return ""
    text, unspaced = document.text, spaceless(document.text)
    ends = ENDS if not text.isascii() else LATIN_ENDS
    marked = document.language not in UNMARKED
    kept, sentences = [], 0
    lower = text.lower()
    suspect, placeholder = any(policy in lower for policy in POLICIES), "lorem ipsum" in lower
    cites, curly = "[" in text, "{" in text and not config.curly_brackets
    for line in text.splitlines():
        line = line.strip()
        if len(line) > config.max_word and not unspaced and max(map(len, line.split())) > config.max_word:
            continue
        words = len(line) // 3 if unspaced else len(line.split(None, config.min_words))
        if cites:
            line = CITATION.sub("", line)
        if marked and (not line.endswith(ends) or line.endswith("...")) or words < config.min_words:
            continue
        lower = line.lower() if suspect or placeholder else ""
        if placeholder and "lorem ipsum" in lower:
            return "placeholder text"
        if suspect and "javascript" in lower:
            continue
        if curly and "{" in line:
            return "curly bracket"
        if suspect and any(policy in lower for policy in POLICIES):
            continue
        if sentences < config.min_sentences:
            sentences += len(SENTENCE.findall(line)) + (not SENTENCE.search(line[-4:]))
        kept.append(line)
    if marked and sentences < config.min_sentences:
        return f"too few sentences: {sentences}"
    document.text = "\n".join(kept).strip()
    return "" if document.text else "no line is left"
