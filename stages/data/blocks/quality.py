"""Quality rules: Gopher's (arXiv 2112.11446, table A1) and C4's (1910.10683) for prose, The Stack's for code.

Prose is counted in units (stages/data/text.py), so that Chinese, Japanese and Thai are not one endless word.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from stages.data.blocks.repetition import REPEATED, TOP
from stages.data.document import Document
from stages.data.text import SPACELESS, rolling, units
from stages.data.thresholds import at_least, at_most

# Function words: a text without any is a list, not prose. Languages not named here (no spaces, attached particles) are not asked.
STOP_WORDS = {
    "en": "the be to of and that have with",
    "fr": "le la les de et un que dans une des en du est pour il par sur ne",
    "es": "el la los de y que en un una las del es se por con no para su",
    "it": "il la di e che un per non una in del è si con gli alla le dei",
    "de": "der die das und ist zu den nicht von mit sie sind an ein eine des sich auf",
    "pt": "o a os de e que em um uma do da para com não se no por as",
    "nl": "de het een en van dat is niet in op te zijn met voor aan er die worden",
    "pl": "i w na z do nie się to że jest o są od po pod ich za oraz",
    "cs": "a v na se je to že do o s z i jsou si ve pro za od",
    "ro": "și de la în a cu pe nu sunt o un din care pentru ce mai este lor",
    "ru": "и в на не что с по это как от из все они но для к о своем",
    "uk": "і в на не що з та до як від у за всі вони це для своїй про",
    "tr": "ve bir bu da de için ile olarak bakımından en daha gibi her ne çok kadar o eşit",
    "id": "dan yang di dengan untuk ini dari tidak ke pada adalah itu karena bisa akan sudah dalam juga",
    "vi": "và của là có các một trong được cho không với người những này đều đó về ra",
    "el": "και το να η ο του της με στην για οι είναι από που σε τα στη την",
    "hi": "के का की में है और से को हैं पर ने यह एक भी नहीं कि हो तथा",
    "fa": "و در به از که این را است با برای آن می هم یک لحاظ هر تا بر",
}
BOILERPLATE = re.compile(r"javascript|cookie policy|terms of use|all rights reserved", re.IGNORECASE)
GENERATED = re.compile(r"auto-?generated|generated (by|from|automatically)|do not edit", re.IGNORECASE)
PAGE = 1000  # words


@dataclass
class Config:
    min_words: int = at_least(50, "prose: fewest words (characters in Chinese, Japanese, Thai)")
    max_words: int = at_most(100_000, "prose: most words")
    min_alphabetic: float = at_least(0.7, "prose: smallest share of words with a letter")
    min_stop_words: int = at_least(2, "prose: fewest occurrences of the language's function words")
    repetition: float = at_most(1.0, "prose: Gopher's limits on repetition are multiplied by this")
    min_code_characters: int = at_least(100, "code: fewest characters")
    max_line: int = at_most(1000, "code: longest line, in characters")
    max_mean_line: float = at_most(100.0, "code: longest mean line, in characters")
    min_code_letters: float = at_least(0.4, "code: smallest share of letters among characters other than space")
    min_names: int = at_least(10, "names: fewest characters")


def clean(document: Document, config: Config) -> str:
    """A reason to remove the document, or "". Lines of site boilerplate are dropped from prose in place."""
    if document.domain == "code":
        return _code(document.text, config)
    if document.domain == "names":
        return "too short" if len(document.text.strip()) < config.min_names else ""
    lines = document.text.split("\n")
    if BOILERPLATE.search(document.text):
        lines = [line for line in lines if len(line) > 200 or not BOILERPLATE.search(line)]
        document.text = "\n".join(lines)
    return _words(document, config) or _lines(lines) or _repetition(document.text, config.repetition)


def _code(text: str, config: Config) -> str:
    lines = text.split("\n")
    longest, mean = max(map(len, lines)), len(text) / len(lines)
    solid = "".join(text.split())
    letters = sum(map(str.isalpha, solid)) / max(len(solid), 1)
    if len(text) < config.min_code_characters:
        return f"code too short: {len(text)} characters"
    if longest > config.max_line or mean > config.max_mean_line:
        return f"code lines too long: longest {longest}, mean {mean:.0f}"
    if letters < config.min_code_letters:
        return f"code is data: {letters:.0%} letters"
    return "generated code" if GENERATED.search(text[:500]) else ""


def _words(document: Document, config: Config) -> str:
    text = document.text
    words, count = text.split(), len(units(text))
    if not config.min_words <= count <= config.max_words:
        return f"number of words: {count}"
    if "lorem ipsum" in text.lower():
        return "placeholder text"
    if (symbols := text.count("#") + text.count("...") + text.count("…")) > 0.1 * count:
        return f"symbols: {symbols} in {count} words"
    if (share := sum(any(map(str.isalpha, word)) for word in words) / len(words)) < config.min_alphabetic:
        return f"words without letters: {1 - share:.0%}"
    if len(SPACELESS.findall(text)) > 0.2 * count:
        return ""  # what follows needs words
    if not 3 <= (mean := sum(map(len, words)) / len(words)) <= 10:
        return f"mean word length: {mean:.1f}"
    if stops := STOP_WORDS.get(document.language):
        wanted = set(stops.split())
        if sum(word in wanted for word in text.lower().split()) < config.min_stop_words:
            return "no function words"
    return ""


def _lines(lines: list[str]) -> str:
    lines = [line.strip() for line in lines if line.strip()]
    bullets = sum(line.startswith(("•", "-", "*", "·")) for line in lines)
    ellipses = sum(line.endswith(("...", "…")) for line in lines)
    if bullets > 0.9 * len(lines) or ellipses > 0.3 * len(lines):
        return f"lines: {bullets} bullets, {ellipses} ellipses of {len(lines)}"
    return ""


def _repetition(text: str, scale: float) -> str:
    """Gopher's rules: shares of repeated lines and paragraphs, of the top 2- to 4-gram, of repeated 5- to 10-grams."""
    for name, mark, limit in (("lines", "\n", 0.30), ("paragraphs", "\n\n", 0.30)):
        parts = [part.strip() for part in text.split(mark) if part.strip()]
        counts = Counter(parts)
        repeated = len(parts) - len(counts)
        characters = sum(len(part) * (n - 1) for part, n in counts.items())
        if repeated > scale * limit * len(parts) or characters > scale * 0.2 * len(text):
            return f"repeated {name}: {repeated} of {len(parts)}"
    words = units(text.lower())
    ids: dict[str, int] = {}
    values = np.array([ids.setdefault(word, len(ids)) for word in words], np.uint64)
    lengths = np.array([len(word) for word in words])
    # The limits were set on pages; a long document repeats itself more and is judged by the mean over its pages.
    pages = np.array_split(np.arange(len(words)), max(1, round(len(words) / PAGE)))
    for n, limit in (TOP | REPEATED).items():
        share = np.mean([_ngram_share(values[page], lengths[page], n, top=n in TOP) for page in pages])
        if share > scale * limit:
            return f"repeated {n}-grams: {share:.0%}"
    return ""


def _ngram_share(values: np.ndarray, lengths: np.ndarray, n: int, top: bool) -> float:
    """Share of a text's characters inside its most frequent n-gram, or inside all n-grams that occurred before."""
    grams = rolling(values, n)
    _, first, inverse, counts = np.unique(grams, return_index=True, return_inverse=True, return_counts=True)
    if not len(counts) or counts.max() < 2:
        return 0.0
    if top:
        best = int(counts.argmax())
        return counts[best] * lengths[first[best] : first[best] + n].sum() / lengths.sum()
    again = np.ones(len(inverse), bool)
    again[first] = False
    covered = np.convolve(again, np.ones(n)) > 0.5
    return lengths[covered].sum() / lengths.sum()
