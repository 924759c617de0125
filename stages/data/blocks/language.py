"""Language identification (py3langid; resiliparse for long texts that it is sure of): fills `language`, removes what is not wanted."""

from dataclasses import dataclass
from functools import cache

from stages.data.document import Document
from stages.data.sources.cldr import LANGUAGES
from stages.data.thresholds import at_least
from stages.stage import option

LIBRARIES = ("py3langid", "resiliparse")
SAMPLE = 300  # characters looked at, at the beginning and in the middle: more changes nothing and costs time
GLANCE = 2000  # characters of a long text
# The languages that resiliparse takes for no other (it mixes up Spanish, Portuguese and Galician, Malay and Indonesian), up
# to a distance of trigrams: prose has 200 to 330 there, a language it does not know 300 and more from its neighbour.
CERTAIN = set("en fr it de ja ko ar zh ru pl tr vi nl cs uk ro el he fa".split())
FAR, NEAR = 350, 290


@dataclass
class Config:
    languages: list[str] = option(LANGUAGES, "ISO 639-1 codes of the languages to keep")
    min_ratio: float = at_least(0.5, "short texts: least probability of the best of them, as a share of the likeliest language's of all")
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
    if (certain := _certain(text)) in config.languages:
        document.language = certain
        return ""
    middle = len(text) // 2
    looked_at = text if len(text) <= 2 * SAMPLE else f"{text[:SAMPLE]}\n{text[middle : middle + SAMPLE]}"
    likeliest, most = _identifier().classify(looked_at)
    found, probability = likeliest, most
    least = config.min_ratio if len(text) < config.min_characters else 1.0
    if likeliest not in config.languages:  # a short text is easily taken for one of eighty others
        ranked = _identifier().rank(looked_at)
        found, probability = next(((code, p) for code, p in ranked if code in config.languages), ("", 0.0))
    if probability < least * most:
        return f"language not wanted: {likeliest} ({most:.2f})"
    document.language = found
    return ""


def _certain(text: str) -> str:
    """The language of a long text where it is beyond doubt, by resiliparse's trigrams: at a fiftieth of the cost; or ""."""
    from resiliparse.parse.lang import detect_fast

    if len(text) < 1000:
        return ""
    found, distance = detect_fast(text[:GLANCE], cutoff=FAR)
    return found if found in CERTAIN and distance <= (FAR if found in ("en", "ja", "ko", "zh") else NEAR) else ""
