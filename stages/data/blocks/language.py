"""Language identification (py3langid): fills `language` and removes prose in languages that are not wanted."""

from dataclasses import dataclass
from functools import cache

from stages.data.document import Document
from stages.data.sources.cldr import LANGUAGES
from stages.stage import option

SAMPLE = 2000  # characters looked at: more changes nothing and costs time


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
    short = len(document.text) < config.min_characters and document.language
    if document.domain in ("code", "names") or short:
        wanted = not document.language or document.language in config.languages
        return "" if wanted else f"language not wanted: {document.language}"
    ranked = _identifier().rank(document.text[:SAMPLE])
    found, probability = next(((code, p) for code, p in ranked if code in config.languages), ("", 0.0))
    if probability < config.min_probability:
        return f"language not wanted: {ranked[0][0]} ({ranked[0][1]:.2f})"
    document.language = found
    return ""
