"""What stands somewhere in long text, to be found again: needles in a haystack, chains of variables, questions (after RULER).

Kinds: "needle", a number by its key, with other keys as decoys (RULER's niah_multikey; its niah_single with one key);
"multi_value", all numbers of one key; "multi_query", the numbers of several keys; "variables", all names that a number was
given on to (variable tracking); "words", the most frequent of coded words (common words extraction); "qa", a question
whose answer takes two statements that stand apart.

The haystack is made of the corpus' sentences, so that its length in tokens follows the corpus; `length` is its length in
characters, `check.depth` the (first) needle's place in percent. Reward: 1 for a short response with what was asked for and
nothing else of its kind, 0 otherwise, -0.5 without anything of its kind; where several things are asked for, RULER's share of
them while nothing wrong is among them.

Your own prompts: `check` is {"number": n} or {"numbers": [n, ...], "ordered": bool} or {"words": [right ones], "among": [all that might be
named]}, with "depth" and the row's `length` where the report shall tell them apart.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from stages.stage import CuveeError, option
from stages.tasks._common import draw, numbers, prompt, sentences

DOCUMENTS = True  # reads the corpus
KINDS = ("needle", "multi_value", "multi_query", "variables", "words", "qa")


@dataclass
class Options:
    lengths: list[int] = option(
        [16000, 64000, 256000], "lengths of the haystack in characters, used in turn (about 4 a token)"
    )
    keys: int = option(4, "hidden numbers a prompt, one of them asked for; 1 is the plain needle")
    vocabulary: int = option(70, "different keys, the first ones of the list")
    digits: int = option(7, "digits of a hidden number")
    kinds: list[str] = option(["needle"], "kinds of prompts, each as often", choices=KINDS)
    asked: int = option(4, "values of multi_value, keys asked of multi_query, hops of variables, words asked of words")


KEYS = (
    "anchor apple arrow basket beach bell bridge butter button candle castle cloud coffee copper cotton desert dragon eagle "
    "engine feather forest garden ginger glass hammer harbour honey island jacket kettle ladder lemon lion marble meadow "
    "mirror monkey mountain needle ocean olive orange paper pencil pepper piano planet pocket puzzle rabbit ribbon river "
    "rocket saddle salmon silver spider spring sugar summer tiger tunnel turtle valley velvet violin wagon walnut whale winter"
).split()
NEEDLE = "The magic number for {key} is {value}."
PEOPLE = "Anna Boris Carla David Elena Frank Greta Henry Irene Jonas Karin Louis Maria Niels Olga Peter".split()
HOUSES = ("old mill|town hall|blue bakery|post office|grain store|music school|north tower|salt works|ferry house|book shop|"
          "copper mine|glass works|fish market|tea house|water works|brick yard").split("|")  # fmt: skip
TOWNS = "Arden Belmar Corvale Dunmore Elstow Farham Glenby Hartwell Inverley Jarrow Kelton Lorne Marston Norwell Oakham Penrith".split()
ASK = (
    "{text}\n\nWhat is the magic number for {key}?",
    "{text}\n\nQuestion: which magic number does {key} have?",
    "{text}\n\nGive the magic number for {key}.",
    "Find the magic number for {key} in this text.\n\n{text}\n\nWhat is the magic number for {key}?",
)


def check(options: Options) -> str:
    """What is wrong with the options, "" if nothing."""
    if not 1 <= options.keys <= options.vocabulary <= len(KEYS):
        return (
            f"keys={options.keys} and vocabulary={options.vocabulary}, expected 1 <= keys <= vocabulary <= {len(KEYS)}"
        )
    hidden = options.keys + (options.asked - 1 if "multi_value" in options.kinds else 0)
    if not 1 <= options.digits <= 15 or hidden > 9 * 10 ** (options.digits - 1):
        return f"digits={options.digits} is not in 1..15 or too small for {hidden} different numbers"
    if not options.lengths or min(options.lengths) < 50 * options.keys:
        return f"lengths={options.lengths}, expected one or more of at least 50 characters a key"
    if not options.kinds or not 1 <= options.asked <= 8:
        return f"kinds={options.kinds} and asked={options.asked}, expected at least one kind and asked in 1..8"
    if "multi_query" in options.kinds and options.asked > options.keys:
        return (
            f"asked={options.asked} of keys={options.keys}; multi_query asks for hidden keys, raise keys or lower asked"
        )
    return ""


def generate(rng: random.Random, count: int, documents: list[dict], options: Options) -> list[dict]:
    """`count` haystacks from the documents' sentences. Raises CuveeError when there are none to build from."""
    hay = sentences(documents, rng)
    if not hay:
        raise CuveeError(
            "the long_context task found no sentence of 30 to 200 characters in the corpus; it needs prose"
        )
    make: dict[str, Callable[..., dict]] = {"needle": _needle, "multi_value": _multi_value, "multi_query": _multi_query,
                                            "variables": _variables, "words": _words, "qa": _qa}  # fmt: skip
    return [
        make[draw(rng, options.kinds)](rng, hay, options.lengths[i % len(options.lengths)], options)
        for i in range(count)
    ]


def _haystack(
    rng: random.Random, hay: list[str], length: int, needles: list[str], keep_order: bool = False
) -> tuple[str, int]:
    """`length` characters of text with the needles in it, and the first one's depth in percent."""
    room = length - sum(len(needle) + 1 for needle in needles)
    chosen, at = [], rng.randrange(len(hay))
    while len(hay[at % len(hay)]) < room:  # consecutive sentences of a shuffled list, round and round
        chosen.append(hay[at % len(hay)])
        room -= len(chosen[-1]) + 1
        at += 1
    if keep_order:
        places = sorted(rng.choices(range(len(chosen) + 1), k=len(needles)))
        for place, needle in zip(reversed(places), reversed(needles), strict=True):
            chosen.insert(place, needle)
        place = chosen.index(needles[0])
    else:
        for needle in needles[1:]:
            chosen.insert(rng.randint(0, len(chosen)), needle)
        place = round(rng.randint(0, 20) / 20 * len(chosen))
        chosen.insert(place, needles[0])
    return " ".join(chosen), round(100 * place / max(1, len(chosen) - 1))


def _values(rng: random.Random, count: int, options: Options) -> list[int]:
    return rng.sample(range(10 ** (options.digits - 1), 10**options.digits), count)


def _needle(rng: random.Random, hay: list[str], length: int, options: Options) -> dict:
    keys = rng.sample(KEYS[: options.vocabulary], options.keys)
    values = _values(rng, options.keys, options)
    needles = [NEEDLE.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
    text, depth = _haystack(rng, hay, length, needles)
    question = rng.choice(ASK).format(text=text, key=keys[0])
    return prompt(question, needles[0], {"number": values[0], "depth": depth}, length=length)


def _asked(text: str, question: str, answer: str, depth: int, length: int, **check: object) -> dict:
    return prompt(f"{text}\n\n{question}", answer, {**check, "depth": depth}, length=length)


def _multi_value(rng: random.Random, hay: list[str], length: int, options: Options) -> dict:
    keys = rng.sample(KEYS[: options.vocabulary], options.keys)
    values = _values(rng, options.asked + options.keys - 1, options)
    own, others = values[: options.asked], values[options.asked :]
    pairs = [*((keys[0], v) for v in own), *zip(keys[1:], others, strict=True)]
    text, depth = _haystack(rng, hay, length, [NEEDLE.format(key=k, value=v) for k, v in pairs])
    found = sorted(own, key=lambda v: text.index(f" {v}."))
    answer = f"The magic numbers for {keys[0]} are {', '.join(map(str, found))}."
    return _asked(text, f"What are all the magic numbers for {keys[0]}?", answer, depth, length, numbers=found)


def _multi_query(rng: random.Random, hay: list[str], length: int, options: Options) -> dict:
    keys = rng.sample(KEYS[: options.vocabulary], options.keys)
    values = _values(rng, options.keys, options)
    text, depth = _haystack(
        rng, hay, length, [NEEDLE.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
    )
    asked = rng.sample(range(options.keys), options.asked)
    answer = " ".join(NEEDLE.format(key=keys[i], value=values[i]) for i in asked)
    question = f"What are the magic numbers for {', '.join(keys[i] for i in asked)}, in this order?"
    return _asked(text, question, answer, depth, length, numbers=[values[i] for i in asked], ordered=True)


def _variables(rng: random.Random, hay: list[str], length: int, options: Options) -> dict:
    """One chain of names, each given the one before, and one of the same length as a decoy."""
    names = [f"VAR_{key.upper()}" for key in rng.sample(KEYS, 2 * (options.asked + 1))]
    values, chains = _values(rng, 2, options), (names[::2], names[1::2])
    left = [[f"{chain[0]} = {value}.", *(f"{b} = {a}." for a, b in pairwise(chain))] for value, chain in zip(values, chains, strict=True)]
    merged = []
    while any(left):
        merged.append(rng.choice([line for line in left if line]).pop(0))
    text, depth = _haystack(rng, hay, length, merged, keep_order=True)
    question = f"Which names were given the value {values[0]}, directly or from another name?"
    return _asked(text, question, f"{', '.join(chains[0])}.", depth, length, words=chains[0])


def _words(rng: random.Random, hay: list[str], length: int, options: Options) -> dict:
    """Coded words in the text, `asked` of them three times as often as the others."""
    syllable = lambda: rng.choice("BDFGKLMNPRSTVZ") + rng.choice("AEIOU")  # noqa: E731
    coded = list(dict.fromkeys(syllable() + syllable() + syllable() for _ in range(3 * options.asked)))
    often = sorted(coded[: options.asked])
    times = max(2, min(30, length // 400 // len(coded)))
    listed = [word for word in coded for _ in range(3 * times if word in often else times)]
    rng.shuffle(listed)
    text, depth = _haystack(rng, hay, length, [f"Code {word}." for word in listed])
    question = f"Which {options.asked} code words stand most often in the text?"
    return _asked(text, question, f"{', '.join(often)}.", depth, length, words=often)


def _qa(rng: random.Random, hay: list[str], length: int, options: Options) -> dict:
    """Who works where is said in one place, where that stands in another; decoys for both."""
    count = min(max(2, options.keys), len(PEOPLE))
    people, houses, towns = rng.sample(PEOPLE, count), rng.sample(HOUSES, count), rng.sample(TOWNS, count)
    facts = [f"{p} works in the {h}." for p, h in zip(people, houses, strict=True)]
    facts += [f"The {h} stands in {t}." for h, t in zip(houses, towns, strict=True)]
    text, depth = _haystack(rng, hay, length, facts)
    question = f"In which town does {people[0]} work?"
    return _asked(
        text, question, f"{people[0]} works in {towns[0]}.", depth, length, words=[towns[0]], among=sorted(towns)
    )


def verify(prompt: dict, completion: str) -> float:
    """1.0 when the completion gives what was asked for and nothing else of its kind, a share for several, -0.5 for nothing.

    At most 200 characters count as an answer to one thing: who copies the haystack has found nothing.
    """
    check = prompt["check"]
    if "words" in check:
        among = check.get("among")
        pattern = "|".join(map(re.escape, among)) if among else r"VAR_[A-Z]+|[A-Z]{6}"
        found, wanted = set(re.findall(rf"\b(?:{pattern})\b", completion)), set(check["words"])
    else:
        found, wanted = set(numbers(completion)), set(check.get("numbers", [check.get("number")]))
    if not found:
        return -0.5
    if found - wanted or len(completion.strip()) > 200 + 60 * (len(wanted) - 1):
        return 0.0
    if check.get("ordered"):
        given = list(dict.fromkeys(numbers(completion)))
        return sum(a == b for a, b in zip(given, check["numbers"], strict=False)) / len(wanted)
    return len(found) / len(wanted)
