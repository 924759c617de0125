"""A number hidden in long text, to be found by its key: needle in a haystack, with other keys as decoys (RULER's niah).

The haystack is made of the corpus' sentences, so that its length in tokens follows the corpus; `length` is its length in
characters, `check.depth` the needle's place in percent. Reward: 1 for a short response with the needle's number and no
other, 0 otherwise, -0.5 without a number.
"""

import random
from dataclasses import dataclass

from stages.stage import CuveeError, option
from stages.tasks._common import numbers, prompt, sentences

DOCUMENTS = True  # reads the corpus


@dataclass
class Options:
    lengths: list[int] = option([16000, 64000, 256000], "lengths of the haystack in characters, used in turn (about 4 a token)")
    keys: int = option(4, "hidden numbers a prompt, one of them asked for; 1 is the plain needle")
    vocabulary: int = option(70, "different keys, the first ones of the list")
    digits: int = option(7, "digits of a hidden number")


KEYS = (
    "anchor apple arrow basket beach bell bridge butter button candle castle cloud coffee copper cotton desert dragon eagle "
    "engine feather forest garden ginger glass hammer harbour honey island jacket kettle ladder lemon lion marble meadow "
    "mirror monkey mountain needle ocean olive orange paper pencil pepper piano planet pocket puzzle rabbit ribbon river "
    "rocket saddle salmon silver spider spring sugar summer tiger tunnel turtle valley velvet violin wagon walnut whale winter"
).split()
NEEDLE = "The magic number for {key} is {value}."
ASK = (
    "{text}\n\nWhat is the magic number for {key}?",
    "{text}\n\nQuestion: which magic number does {key} have?",
    "{text}\n\nGive the magic number for {key}.",
    "Find the magic number for {key} in this text.\n\n{text}\n\nWhat is the magic number for {key}?",
)


def check(options: Options) -> str:
    """What is wrong with the options, "" if nothing."""
    if not 1 <= options.keys <= options.vocabulary <= len(KEYS):
        return f"keys={options.keys} and vocabulary={options.vocabulary}, expected 1 <= keys <= vocabulary <= {len(KEYS)}"
    if not 1 <= options.digits <= 15 or options.keys > 9 * 10 ** (options.digits - 1):
        return f"digits={options.digits} is not in 1..15 or too small for {options.keys} different numbers"
    if not options.lengths or min(options.lengths) < 50 * options.keys:
        return f"lengths={options.lengths}, expected one or more of at least 50 characters a key"
    return ""


def generate(rng: random.Random, count: int, documents: list[dict], options: Options) -> list[dict]:
    """`count` haystacks from the documents' sentences. Raises CuveeError when there are none to build from."""
    hay = sentences(documents, rng)
    if not hay:
        raise CuveeError("the long_context task found no sentence of 30 to 200 characters in the corpus; it needs prose")
    return [_haystack(rng, hay, options.lengths[i % len(options.lengths)], options) for i in range(count)]


def _haystack(rng: random.Random, hay: list[str], length: int, options: Options) -> dict:
    keys = rng.sample(KEYS[: options.vocabulary], options.keys)
    values = rng.sample(range(10 ** (options.digits - 1), 10**options.digits), options.keys)
    needles = [NEEDLE.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
    room = length - sum(len(needle) + 1 for needle in needles)
    chosen, at = [], rng.randrange(len(hay))
    while len(hay[at % len(hay)]) < room:  # consecutive sentences of a shuffled list, round and round
        chosen.append(hay[at % len(hay)])
        room -= len(chosen[-1]) + 1
        at += 1
    for needle in needles[1:]:
        chosen.insert(rng.randint(0, len(chosen)), needle)
    place = round(rng.randint(0, 20) / 20 * len(chosen))
    chosen.insert(place, needles[0])
    text = " ".join(chosen)
    depth = round(100 * place / max(1, len(chosen) - 1))
    question = rng.choice(ASK).format(text=text, key=keys[0])
    return prompt(question, needles[0], {"number": values[0], "depth": depth}, length=length)


def verify(prompt: dict, completion: str) -> float:
    """1.0 when the completion's numbers are the needle's and no other, -0.5 without a number, else 0.0.

    At most 200 characters count as an answer: who copies the haystack has found nothing.
    """
    found = numbers(completion)
    right = set(found) == {prompt["check"]["number"]} and len(completion.strip()) <= 200
    return float(right) if found else -0.5
