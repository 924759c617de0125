"""Arithmetic word problems: one story, one to a few steps, a whole number as the answer.

Reward: 1 when the last number of the response is the answer, -0.5 without any number, 0 otherwise.
"""

import random
from dataclasses import dataclass

from stages.stage import option
from stages.tasks._common import numbers, prompt

OPERATIONS = ("add", "subtract", "multiply", "divide")


@dataclass
class Options:
    max_number: int = option(100, "largest number in a story and in its answer")
    steps: int = option(3, "most steps of a story; each story has 1 to this many")
    operations: list[str] = option(list(OPERATIONS), "what a step may do; multiply and divide only in stories of one step",
                                   choices=OPERATIONS)  # fmt: skip


WHO = "farmer teacher baker sailor doctor painter driver gardener student child cook guard".split()
THINGS = "apples books coins cups eggs cards keys lamps nuts pens plates shells stones tickets".split()
ASK = ("How many {t} are there now?", "How many {t} does that make?", "How many {t} are left in the end?", "How many {t}?")
START = ("A {w} has {a} {t}", "There are {a} {t} on a table", "A {w} starts with {a} {t}", "A box holds {a} {t}")
ADD = ("gets {b} more", "finds {b} more", "buys {b} more", "adds {b} more", "is given {b} more")
SUBTRACT = ("loses {b}", "gives away {b}", "sells {b}", "breaks {b}", "takes {b} away")
MULTIPLY = (
    "A {w} has {a} bags with {b} {t} each. How many {t}?",
    "There are {a} rows of {b} {t}. How many {t} are there?",
    "A {w} buys {b} {t} a day for {a} days. How many {t} does that make?",
)
DIVIDE = (
    "A {w} shares {a} {t} among {b} friends. How many {t} does each get?",
    "{a} {t} are put in {b} equal bags. How many {t} are in a bag?",
    "A {w} uses {b} {t} a day. How many days do {a} {t} last?",
)


def check(options: Options) -> str:
    """What is wrong with the options, "" if nothing."""
    if options.max_number < 4 or options.steps < 1 or not options.operations:
        return "a story needs max_number of at least 4, steps of at least 1 and one of the operations"
    return ""


def generate(rng: random.Random, count: int, documents: list[dict], options: Options) -> list[dict]:
    """`count` word problems; `documents` are not used."""
    return [_story(rng, options) for _ in range(count)]


def _story(rng: random.Random, options: Options) -> dict:
    first, top = rng.choice(options.operations), options.max_number
    words = {"w": rng.choice(WHO), "t": rng.choice(THINGS)}
    if first == "multiply":
        b = rng.randint(1, max(1, int(top**0.5)))
        a = rng.randint(1, top // b)
        return _prompt(rng.choice(MULTIPLY).format(a=a, b=b, **words), f"{a} * {b} = {a * b}", a * b)
    if first == "divide":
        b = rng.randint(2, max(2, int(top**0.5)))
        result = rng.randint(1, max(1, top // b))
        return _prompt(rng.choice(DIVIDE).format(a=result * b, b=b, **words), f"{result * b} / {b} = {result}", result)
    return _events(rng, [first] + [o for o in options.operations if o in ("add", "subtract")], words, options)


def _events(rng: random.Random, allowed: list[str], words: dict[str, str], options: Options) -> dict:
    """A start and one to a few gains and losses; no number ever leaves 0..max_number."""
    total = rng.randint(0 if "add" in allowed else 1, options.max_number)
    story, working = [rng.choice(START).format(a=total, **words)], []
    for step in range(rng.randint(1, options.steps)):
        kind = allowed[0] if step == 0 else rng.choice(allowed[1:])
        room = options.max_number - total if kind == "add" else total
        if room == 0:
            kind, room = ("subtract", total) if kind == "add" else ("add", options.max_number - total)
        change = rng.randint(1, room)
        after = total + change if kind == "add" else total - change
        working.append(f"{total} {'+' if kind == 'add' else '-'} {change} = {after}")
        story.append(rng.choice(ADD if kind == "add" else SUBTRACT).format(b=change))
        total = after
    subject = "someone" if story[0].startswith(("There", "A box")) else f"the {words['w']}"
    text = f"{story[0]}. " + ", then ".join([f"{subject} {story[1]}".capitalize(), *story[2:]])
    return _prompt(f"{text}. {rng.choice(ASK).format(**words)}", ". ".join(working), total)


def _prompt(question: str, working: str, result: int) -> dict:
    return prompt(question, working, {"number": result})


def verify(prompt: dict, completion: str) -> float:
    """1.0 when the last number in the completion is the answer, -0.5 when there is none, else 0.0."""
    found = numbers(completion)
    return (1.0 if found[-1] == prompt["check"]["number"] else 0.0) if found else -0.5
