"""Translation between English and 22 languages: names, dates and numbers from CLDR (through Babel), and your own pairs.

Names are days, months, languages, territories and currencies; dates and numbers are to be written as the language does. Reward: 1
for one of the right forms (case, quotes and final punctuation aside), 0 otherwise; of a pair, whose right translations are many,
chrF (Popovic, 2015) with the reference, in [0, 1].

A name follows from nothing else: held-out prompts ask, in other words, for names that training prompts ask for too. Their score
says what was learned by heart; that of dates and numbers, whether the rule was.

Your own prompts: `check` is {"names": [right forms]} or {"translation": text}, with "language" (ISO 639-1) for the reward of that name.
"""

import datetime
import json
import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from stages.stage import CuveeError, option
from stages.tasks._common import language_names, plain, prompt

LANGUAGES = tuple("ar cs de el es fa fr he hi id it ja ko nl pl pt ro ru tr uk vi zh".split())
CATEGORIES = ("days", "months", "languages", "territories")
KINDS = (*CATEGORIES, "currencies", "dates", "numbers", "pairs")


@dataclass
class Options:
    languages: list[str] = option(list(LANGUAGES), "ISO 639-1 codes; English is the other side", choices=LANGUAGES)
    categories: list[str] = option(list(CATEGORIES), "what is translated", choices=KINDS)
    file: str = option("", "for pairs: JSONL of {source, target, from, to}, texts and their ISO 639-1 codes, or {en, <code>}")
    items: int = option(0, "names a category, the first ones of its list; 0 takes all")
    into_english: float = option(0.3, "share of questions from the other language into English")


CURRENCIES = "AUD BRL CAD CHF CNY CZK DKK EGP EUR GBP HUF IDR ILS INR IRR JPY KRW MXN NOK PLN RON RUB SEK TRY UAH USD VND".split()
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
    if not options.languages or not options.categories:
        return "name at least one of languages and one of categories"
    if ("pairs" in options.categories) != bool(options.file):
        return f"file={options.file!r} and categories={options.categories}: the category pairs needs a file, and a file that category"
    return ""


def files(options: Options) -> list[str]:
    """The user's files that `generate` reads."""
    return [options.file] if options.file else []


@cache
def names(language: str, category: str) -> dict[str, str]:
    """CLDR's names in one language: key -> name. Days from Monday, the rest in the order of their codes."""
    from babel import Locale

    if category == "currencies":
        table = Locale.parse(language).currencies
        return {code: table[code] for code in CURRENCIES if code in table}
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
    """`count` texts to translate; `documents` are not used. Raises CuveeError for a file that holds no pair."""
    if set(options.categories) <= set(CATEGORIES):
        facts = _facts(options, options.categories)
        return [_question(rng, *rng.choice(facts), rng.random() < options.into_english) for _ in range(count)]
    facts = {c: _facts(options, [c]) for c in options.categories if c in (*CATEGORIES, "currencies")}
    pairs = _pairs(options.file, options.languages) if options.file else []
    made = []
    for _ in range(count):
        category = rng.choice(options.categories)
        if category in facts:
            made.append(_question(rng, *rng.choice(facts[category]), rng.random() < options.into_english))
        elif category == "pairs":
            made.append(_translation(*rng.choice(pairs)))
        else:
            made.append(_written(rng, category, rng.choice(options.languages)))
    return made


def _facts(options: Options, categories: list[str]) -> list[tuple[str, str, str]]:
    facts = []
    for category in categories:
        keys = list(names("en", category))[: options.items or None]
        facts += [(category, key, own) for key in keys for own in options.languages if key in names(own, category)]
    return facts


def _written(rng: random.Random, category: str, language: str) -> dict:
    """A date or a number, to be written as the language does."""
    from babel import dates, numbers

    called = language_names()[language]
    if category == "dates":
        day = datetime.date(rng.randint(1900, 2050), rng.randint(1, 12), rng.randint(1, 28))
        form = rng.choice(("long", "full", "medium"))
        right = dates.format_date(day, form, language)
        asked = {"long": "in full", "full": "in full with the day of the week", "medium": "in the usual short form"}[form]
        question = f"Write the date {day.isoformat()} {asked} in {called}."
    else:
        value = rng.randint(1000, 99999999) / rng.choice((1, 10, 100))
        right = numbers.format_decimal(value, locale=language, decimal_quantization=False)
        question = f"Write the number {value:.10g} with {called} separators."
    return prompt(question, right, {"names": sorted({right, _spaces(right)}), "language": language})


def _spaces(text: str) -> str:
    """With plain spaces for CLDR's narrow and no-break ones, and without its marks of direction."""
    return "".join(" " if c in "\u00a0\u202f\u2009" else c for c in text if c not in "\u200e\u200f\u061c")


def _pairs(file: str, languages: list[str]) -> list[tuple[str, str, str, str]]:
    """(source, target, from, to) of each line that holds one, both ways for {en, code}. Raises CuveeError when none does."""
    try:
        lines = Path(file).expanduser().read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CuveeError(f"data.prompts.options.file: {file} can't be read as UTF-8 text ({error}); give a JSONL file") from None
    known, found = {*languages, "en"}, []
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or not all(isinstance(v, str) and v.strip() for v in row.values()):
            continue
        if {"source", "target", "from", "to"} <= set(row):
            found.append((row["source"], row["target"], row["from"], row["to"]))
        elif "en" in row and len(row) == 2:
            other = next(k for k in row if k != "en")
            found += [(row["en"], row[other], "en", other), (row[other], row["en"], other, "en")]
    found = list(dict.fromkeys(pair for pair in found if {pair[2], pair[3]} <= known))
    if not found:
        raise CuveeError(f"data.prompts.options.file: {file} holds no pair of {', '.join(sorted(known))}; give JSON lines such as "
                         f'{{"en": "Good morning.", "fr": "Bonjour."}}')  # fmt: skip
    return found


def _translation(source: str, target: str, origin: str, into: str) -> dict:
    """One wording a pair, so that a pair is either held out or trained on."""
    question = f"Translate from {language_names()[origin]} into {language_names()[into]}:\n{source}"
    return prompt(question, target, {"translation": target, "language": into})


def _question(rng: random.Random, category: str, key: str, language: str, into_english: bool) -> dict:
    english, other = names("en", category), names(language, category)
    called = language_names()[language]
    source, target = (other, english) if into_english else (english, other)
    question = rng.choice(INTO_ENGLISH if into_english else FROM_ENGLISH).format(x=source[key], l=called)
    right = sorted({target[k] for k in source if source[k] == source[key] and k in target})
    return prompt(question, target[key], {"names": right, "language": "en" if into_english else language})


def verify(prompt: dict, completion: str) -> float:
    """1.0 for a right form, else 0.0; of a pair, chrF."""
    check = prompt["check"]
    if "translation" in check:
        return chrf(completion, check["translation"])
    return float(plain(_spaces(completion)) in {plain(_spaces(name)) for name in check["names"]})


def chrf(text: str, reference: str, order: int = 6, beta: float = 2.0) -> float:
    """chrF of one text, in [0, 1]: precision and recall of the characters' n-grams without white space, averaged over n = 1 to `order`
    where the reference has any, recall weighted `beta` times (Popovic, "chrF", WMT 2015, eq. 1; as sacrebleu's default)."""
    text, reference = "".join(text.split())[:20000], "".join(reference.split())
    precision, recall, orders = 0.0, 0.0, 0
    for n in range(1, order + 1):
        mine, wanted = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (text, reference))
        if mine and wanted:
            shared = (mine & wanted).total()
            precision, recall, orders = precision + shared / mine.total(), recall + shared / wanted.total(), orders + 1
    if not orders or not precision + recall:
        return 0.0
    precision, recall = precision / orders, recall / orders
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
