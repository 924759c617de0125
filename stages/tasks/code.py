"""Short Python functions from a description, checked by running them on inputs in the sandbox.

Reward, as in Command A: the fraction of unit tests passed (at least 4 of them), -1 without a code block.
"""

import random
import re
from dataclasses import dataclass

from stages import sandbox
from stages.stage import option
from stages.tasks._common import prompt

KINDS = ("number", "two_numbers", "text", "list")


@dataclass
class Options:
    kinds: list[str] = option(list(KINDS), "what the function takes", choices=KINDS)
    max_number: int = option(100, "largest constant in a description")
    operations: int = option(3, "most operations in a row on a number; each function has 1 to this many")
    tests: int = option(6, "unit tests a function, at least 4")


NAMES = "f g h run calc solve apply change make check work step".split()
ASK = (
    "Write a function {name}({args}) that returns {what}.",
    "Write a Python function {name}({args}) returning {what}.",
    "Define {name}({args}). It returns {what}.",
    "I need a function {name}({args}) that gives {what}.",
    "Implement {name}({args}): return {what}.",
    "Code a function {name}({args}) to return {what}.",
)
# What is asked and the expression that does it; {n} is a constant, {e} the expression so far.
NUMBER = (
    ("plus {n}", "{e} + {n}"),
    ("minus {n}", "{e} - {n}"),
    ("times {n}", "{e} * {n}"),
    ("modulo {n}", "{e} % {n}"),
)
TWO_NUMBERS = (
    ("the sum of {a} and {b}", "{a} + {b}"),
    ("the difference {a} minus {b}", "{a} - {b}"),
    ("the product of {a} and {b}", "{a} * {b}"),
    ("the larger of {a} and {b}", "max({a}, {b})"),
    ("the smaller of {a} and {b}", "min({a}, {b})"),
    ("{a} plus {n} times {b}", "{a} + {n} * {b}"),
)
TEXT = (
    ("{a} in upper case", "{a}.upper()"),
    ("{a} in lower case", "{a}.lower()"),
    ("{a} reversed", "{a}[::-1]"),
    ("the length of {a}", "len({a})"),
    ("{a} repeated {n} times", "{a} * {n}"),
    ("the first {n} characters of {a}", "{a}[:{n}]"),
    ("how often '{c}' is in {a}", "{a}.count('{c}')"),
)
LIST = (
    ("the sum of {a}", "sum({a})"),
    ("the largest item of {a}", "max({a})"),
    ("the smallest item of {a}", "min({a})"),
    ("{a} in sorted order", "sorted({a})"),
    ("{a} reversed", "{a}[::-1]"),
    ("the first {n} items of {a}", "{a}[:{n}]"),
    ("each item of {a} plus {n}", "[x + {n} for x in {a}]"),
    ("each item of {a} times {n}", "[x * {n} for x in {a}]"),
    ("the items of {a} above {n}", "[x for x in {a} if x > {n}]"),
)
ARGUMENTS = {"number": ("x", "n", "y", "a", "v"), "text": ("s", "text", "t"), "list": ("items", "xs", "values")}


def check(options: Options) -> str:
    """What is wrong with the options, "" if nothing."""
    if options.max_number < 2 or options.operations < 1 or options.tests < 4 or not options.kinds:
        return "a function needs max_number of at least 2, operations of at least 1, at least 4 tests and one of the kinds"
    return ""


def generate(rng: random.Random, count: int, documents: list[dict], options: Options) -> list[dict]:
    """`count` functions to write; `documents` are not used."""
    return [_function(rng, options) for _ in range(count)]


def _function(rng: random.Random, options: Options) -> dict:
    kind = rng.choice(options.kinds)
    constant = lambda: rng.randint(2, max(2, options.max_number))  # noqa: E731
    arguments = rng.sample(ARGUMENTS["number"], 2) if kind == "two_numbers" else [rng.choice(ARGUMENTS[kind])]
    if kind == "number":
        what = expression = arguments[0]
        for step in range(rng.randint(1, options.operations)):
            words, code = rng.choice(NUMBER)
            n, inner = constant(), f"({expression})" if step else expression
            what, expression = f"{what}{', ' if step else ' '}{words.format(n=n)}", code.format(e=inner, n=n)
    else:
        words, code = rng.choice({"two_numbers": TWO_NUMBERS, "text": TEXT, "list": LIST}[kind])
        small = kind == "text" or "first" in words
        values = {"a": arguments[0], "b": arguments[-1], "n": rng.randint(2, 4) if small else constant(), "c": rng.choice("aeo")}
        what, expression = words.format(**values), code.format(**values)
    name = rng.choice(NAMES)
    question = rng.choice(ASK).format(name=name, args=", ".join(arguments), what=what)
    inputs = [_input(rng, kind) for _ in range(max(4, options.tests))]
    reference = eval(f"lambda {', '.join(arguments)}: {expression}")  # our own expression, from the tables above
    tests = [[f"{name}({', '.join(map(repr, values))})", repr(reference(*values))] for values in inputs]
    source = f"def {name}({', '.join(arguments)}):\n    return {expression}\n"
    return prompt(question, f"```python\n{source}```", {"tests": tests})


def _input(rng: random.Random, kind: str) -> tuple:
    if kind == "text":
        return ("".join(rng.choice("abcdeoABCE ") for _ in range(rng.randint(4, 8))),)
    if kind == "list":
        return ([rng.randint(-20, 120) for _ in range(rng.randint(4, 7))],)
    return tuple(rng.randint(-50, 150) for _ in range(2 if kind == "two_numbers" else 1))


def code_block(completion: str) -> str | None:
    """The first fenced block that is Python or says nothing else; None without one."""
    found = re.search(r"```(?:python|py)?[ \t]*\n(.*?)```", completion, re.DOTALL)
    return found[1] if found else None


def verify(prompt: dict, completion: str) -> float:
    """The fraction of unit tests passed, -1.0 without a code block. For many, `verify_batch` is far faster."""
    return verify_batch([prompt], [completion])[0]


def verify_batch(prompts: list[dict], completions: list[str]) -> list[float]:
    """`verify` for many pairs in one round of the sandbox. A test passes when the results' `repr` are equal."""
    blocks = [code_block(completion) for completion in completions]
    chosen = [i for i, block in enumerate(blocks) if block is not None]
    tests = [prompts[i]["check"]["tests"] for i in chosen]
    programs = [sandbox.Program(blocks[i], [call for call, _ in t]) for i, t in zip(chosen, tests, strict=True)]
    scores = [-1.0] * len(prompts)
    for i, expected, outcome in zip(chosen, tests, sandbox.run(programs), strict=True):
        passed = sum(value == wanted for value, (_, wanted) in zip(outcome.values, expected, strict=True))
        scores[i] = passed / len(expected)
    return scores
