"""Word problems of one to a few steps with a whole number as the answer, and exercises of ten topics in three levels.

Reward of a story (`check.number`): 1 when the last number of the response is the answer, -0.5 without any number, 0 otherwise. Of an
exercise, and of your own prompts (`check.value`, an expression in LaTeX): 1 when math-verify finds the answer equal to what stands
after the last "Answer:" or in the last \\boxed{}, 0 when not, -0.5 without any such mark. An answer that leaves the work undone
is none: a number is to be written as one, and a derivative as what it is.
"""

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from stages.stage import option
from stages.tasks import _exercises
from stages.tasks._common import draw, numbers, prompt

OPERATIONS = ("add", "subtract", "multiply", "divide")
TOPICS = ("stories", *_exercises.TOPICS)
# Of LaTeX, what may stand in an answer: a model writes it, and sympy would set out to compute 9^(9^9) or a sum to 10^9.
COMMANDS = set(
    "frac dfrac tfrac sqrt pi cdot times left right pm circ infty log ln exp sin cos tan text mathrm cup in".split()
)
LONGEST, POWERS = 120, 10000  # characters of an answer; the product of its exponents
# A whole number, a decimal or a fraction.
_NUMBER = re.compile(
    r"[-+]? *(?:(?:\d+|\d{1,3}(?:[ ,]\d{3})+)(?:\.\d+)? *(?:\\?%)?|\.\d+|\d+ */ *\d+|\\[dt]?frac *\{ *-?\d+ *\} *\{ *-?\d+ *\})"
)
_EXPONENT = r"\^\s*(\{[^{}]*\}|\([^()]*\)|-?\w+)"


@dataclass
class Options:
    max_number: int = option(100, "largest number in a story and in its answer")
    steps: int = option(3, "most steps of a story; each story has 1 to this many")
    operations: list[str] = option(list(OPERATIONS), "what a step may do; multiply and divide only in stories of one step",
                                   choices=OPERATIONS)  # fmt: skip
    topics: list[str] = option(
        ["stories"], "kinds of problems, each as often; stories have the options above", choices=TOPICS
    )
    levels: list[int] = option([1, 2, 3], "levels of the exercises, 1 to 3, each as often")


WHO = "farmer teacher baker sailor doctor painter driver gardener student child cook guard".split()
THINGS = "apples books coins cups eggs cards keys lamps nuts pens plates shells stones tickets".split()
ASK = (
    "How many {t} are there now?",
    "How many {t} does that make?",
    "How many {t} are left in the end?",
    "How many {t}?",
)
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
    if not options.topics or not options.levels or not set(options.levels) <= {1, 2, 3}:
        return (
            f"levels={options.levels} and topics={options.topics}, expected levels of 1, 2 or 3 and at least one topic"
        )
    return ""


def generate(rng: random.Random, count: int, documents: list[dict], options: Options) -> list[dict]:
    """`count` problems; `documents` are not used."""
    made = []
    for _ in range(count):
        topic = draw(rng, options.topics)
        made.append(_story(rng, options) if topic == "stories" else _exercise(rng, topic, rng.choice(options.levels)))
    return made


def _exercise(rng: random.Random, topic: str, level: int) -> dict:
    question, working, value = _exercises.TOPICS[topic](rng, level)
    return prompt(question, f"{working}. Answer: ${value}$", {"value": value, "topic": topic, "level": level})


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
    total = rng.randint(0 if "add" in allowed else 1, options.max_number - ("subtract" not in allowed))
    story, working = [rng.choice(START).format(a=total, **words)], []
    for step in range(rng.randint(1, options.steps)):
        kind = allowed[0] if step == 0 else rng.choice(allowed[1:])
        room = options.max_number - total if kind == "add" else total
        if room == 0:
            kind, room = ("subtract", total) if kind == "add" else ("add", options.max_number - total)
            if kind not in allowed:
                break
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
    """1.0 for the right answer, -0.5 when the completion gives none, else 0.0; see the module's text for both kinds."""
    if "value" in prompt["check"]:
        given = final(completion)
        return float(_equal(prompt["check"]["value"], given)) if given else -0.5
    found = numbers(completion)
    return (1.0 if found[-1] == prompt["check"]["number"] else 0.0) if found else -0.5


def final(completion: str) -> str:
    """What the completion gives as its answer, without marks of LaTeX around it; "" where it gives none."""
    boxed = completion.rpartition("\\boxed{")
    if boxed[1]:
        depth = 1
        for end, character in enumerate(boxed[2]):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if not depth:
                return boxed[2][:end].strip()
    said = re.findall(r"[Aa]nswer(?: is)?:? +(.+)", completion)
    return said[-1].strip().rstrip(".").strip("$ ") if said else ""


@lru_cache(1 << 16)  # samples repeat, and comparing takes up to a quarter of a second
def _equal(value: str, given: str) -> bool:
    if value.replace(" ", "") == given.replace(" ", ""):
        return True
    if "=" not in value:
        given = re.sub(r"^[A-Za-z]'?(?:\([a-z]\))? *= *", "", given)
    if not _bounded(given) or not _done(value, given):
        return False
    import threading

    from math_verify import parse, verify

    # Its limits of time are signals, which a main thread alone may set.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    wanted, found = (parse(f"${text}$", parsing_timeout=seconds) for text in (value, given))
    return bool(verify(wanted, found, timeout_seconds=seconds))


def _done(value: str, given: str) -> bool:
    """Whether the answer is worked out: math-verify would evaluate a copy of the question."""
    if _NUMBER.fullmatch(value):
        return _NUMBER.fullmatch(given) is not None
    return ("=" in value or "=" not in given) and not re.search(r"frac\s*\{?\s*d", given)


def _bounded(text: str) -> bool:
    """Whether comparing the text takes little time: sympy's whole numbers can't be interrupted."""
    exponents = re.findall(_EXPONENT, text)
    digits = [int(n) for exponent in exponents for n in re.findall(r"\d{1,9}", exponent)]
    return (
        len(text) <= LONGEST
        and set(re.findall(r"\\([A-Za-z]+)", text)) <= COMMANDS
        and "!" not in text
        and len(exponents) == text.count("^")  # what is left out has another one inside
        and not re.search(rf"{_EXPONENT}\s*\^", text)
        and not any(set("*/^") & set(exponent) for exponent in exponents)
        and prod(digits) <= POWERS
    )
