"""Translation of names between English and 22 languages, from CLDR (through Babel): days, months, languages, territories.

Reward: 1 for one of the right names (case, quotes and final punctuation aside), 0 otherwise.
"""

import random
from dataclasses import dataclass
from functools import cache

from stages.stage import option
from stages.tasks._common import plain, prompt

LANGUAGES = tuple("ar cs de el es fa fr he hi id it ja ko nl pl pt ro ru tr uk vi zh".split())
CATEGORIES = ("days", "months", "languages", "territories")


@dataclass
class Options:
    languages: list[str] = option(list(LANGUAGES), "ISO 639-1 codes; English is the other side", choices=LANGUAGES)
    categories: list[str] = option(list(CATEGORIES), "what kinds of names", choices=CATEGORIES)
    items: int = option(0, "names a category, the first ones of its list; 0 takes all")
    into_english: float = option(0.3, "share of questions from the other language into English")


FROM_ENGLISH = (
    'Translate "{x}" into {l}.',
    'How do you say "{x}" in {l}?',
    'What is "{x}" in {l}?',
    'Give the {l} word for "{x}".',
    '"{x}" in {l}?',
    "In {l}, what is {x} called?",
)
INTO_ENGLISH = (
    'Translate "{x}" from {l} into English.',
    'What does the {l} word "{x}" mean?',
    'What is the {l} "{x}" in English?',
    '{l} "{x}", in English?',
)


def check(options: Options) -> str:
    """What is wrong with the options, "" if nothing."""
    return "" if options.languages and options.categories else "name at least one of languages and one of categories"


@cache
def names(language: str, category: str) -> dict[str, str]:
    """CLDR's names in one language: key -> name. Days from Monday, the rest in the order of their codes."""
    from babel import Locale

    if category in ("days", "months"):
        return {str(key): name for key, name in sorted(_calendar(language, category).items())}
    table = getattr(Locale.parse(language), category)
    codes = sorted(k for k in table if k.isalpha() and len(k) == 2)
    if category == "languages":  # the languages of the model first, so that a small set is a useful one
        codes.sort(key=lambda code: code not in ("en", *LANGUAGES))
    return {code: table[code] for code in codes}


def _calendar(language: str, category: str) -> dict[int, str]:
    """The stand-alone (nominative) names where the language has its own, else those that stand in dates.

    Read from the locale's own file: Babel's merged tables keep one language's alias for all others (2.18: after Hebrew
    has been asked for its stand-alone months, so does Chinese answer, in Hebrew).
    """
    import pickle

    from babel.localedata import resolve_locale_filename

    with open(resolve_locale_filename(language), "rb") as file:
        table = pickle.load(file)[category]
    own = table.get("stand-alone", {}).get("wide")
    return own if isinstance(own, dict) and len(own) >= 7 else table["format"]["wide"]


def generate(rng: random.Random, count: int, documents: list[dict], options: Options) -> list[dict]:
    """`count` names to translate; `documents` are not used."""
    facts = []
    for category in options.categories:
        keys = list(names("en", category))[: options.items or None]
        facts += [(c, k, l) for c, k in ((category, k) for k in keys) for l in options.languages if k in names(l, c)]  # noqa: E741
    return [_question(rng, *rng.choice(facts), rng.random() < options.into_english) for _ in range(count)]


def _question(rng: random.Random, category: str, key: str, language: str, into_english: bool) -> dict:
    english, other = names("en", category), names(language, category)
    called = names("en", "languages")[language]
    source, target = (other, english) if into_english else (english, other)
    question = rng.choice(INTO_ENGLISH if into_english else FROM_ENGLISH).format(x=source[key], l=called)
    right = sorted({target[k] for k in source if source[k] == source[key] and k in target})
    return prompt(question, target[key], {"names": right, "language": "en" if into_english else language})


def verify(prompt: dict, completion: str) -> float:
    """1.0 for a right name, else 0.0."""
    return float(plain(completion) in {plain(name) for name in prompt["check"]["names"]})
