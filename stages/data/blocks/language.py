"""Language identification (py3langid; resiliparse for long English texts): fills `language`, removes what is not wanted."""

from dataclasses import dataclass
from functools import cache

from stages.data.document import Document
from stages.data.sources.cldr import LANGUAGES
from stages.stage import option

SAMPLE = 300  # characters looked at, at the beginning and in the middle: more changes nothing and costs time
GLANCE, MAX_DISTANCE = 2000, 350  # characters, and the distance of trigrams (English prose has 200 to 330 there)


@dataclass
class Config:
    languages: list[str] = option(LANGUAGES, "ISO 639-1 codes of the languages to keep")
    min_probability: float = option(0.2, "smallest probability of the best of them")
    min_characters: int = option(300, "a shorter document keeps the language its source declares")


@cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def clean(document: Document, config: Config) -> str:
    """Sets the language in place; a reason to remove the document, or "". Code and names keep what they declare."""
    text = document.text
    short = len(text) < config.min_characters and document.language
    if document.domain in ("code", "names") or short:
        wanted = not document.language or document.language in config.languages
        return "" if wanted else f"language not wanted: {document.language}"
    if "en" in config.languages and _english(text):
        document.language = "en"
        return ""
    middle = len(text) // 2
    ranked = _identifier().rank(text if len(text) <= 2 * SAMPLE else f"{text[:SAMPLE]}\n{text[middle : middle + SAMPLE]}")
    found, probability = next(((code, p) for code, p in ranked if code in config.languages), ("", 0.0))
    if probability < config.min_probability:
        return f"language not wanted: {ranked[0][0]} ({ranked[0][1]:.2f})"
    document.language = found
    return ""


def _english(text: str) -> bool:
    """Whether a long text is English beyond doubt, by resiliparse's trigrams: at a fiftieth of the cost."""
    from resiliparse.parse.lang import detect_fast

    found, distance = detect_fast(text[:GLANCE], cutoff=MAX_DISTANCE) if len(text) >= 1000 else ("", 0)
    return found == "en"
