"""Short functions from a description or from examples of their calls, in eight languages and SQL, run in the sandbox.

Reward, as in Command A: the fraction of unit tests passed (at least 4 of them), -1 without a code block. Prompts are made
without any interpreter; judging them needs the languages' programs on this machine (Python and SQLite come with Cuvee).

Your own prompts: `check` is {"tests": [[call, repr of its result], ...]} for Python; with "written_in" the results are JSON; for
"sql" {"written_in": "sql", "tests": [[script that fills a database, repr of the list of rows], ...], "ordered": bool}.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from stages import sandbox
from stages.stage import option
from stages.tasks import _algorithms, _languages, _sql
from stages.tasks._common import draw, prompt

KINDS = ("number", "two_numbers", "text", "list")
LANGUAGES = ("python", *_languages.LANGUAGES, "sql")


@dataclass
class Options:
    languages: list[str] = option(["python"], "languages of the functions, each as often", choices=LANGUAGES)
    kinds: list[str] = option(list(KINDS), "what the function takes; algorithm: Python functions of several lines",
                              choices=(*KINDS, "algorithm"))  # fmt: skip
    tables: int = option(1, "tables an SQL query may need, 1 or 2 (joins)")
    max_number: int = option(100, "largest constant in a description")
    operations: int = option(3, "most operations in a row on a number; each function has 1 to this many")
    tests: int = option(6, "unit tests a function, at least 4")
    examples: float = option(0.0, "share of the Python functions that are told by examples of their calls, not in words")


NAMES = "f g h run calc solve apply change make check work step".split()
FOREIGN = ("write a function {name}({args}) that returns {what}.", "define {name}({args}), which returns {what}.",
           "implement {name}({args}): return {what}.")  # fmt: skip
ASK = (
    "Write a function {name}({args}) that returns {what}.",
    "Write a Python function {name}({args}) returning {what}.",
    "Define {name}({args}). It returns {what}.",
    "I need a function {name}({args}) that gives {what}.",
    "Implement {name}({args}): return {what}.",
    "Code a function {name}({args}) to return {what}.",
)
BY_EXAMPLE = (
    "Write a function {name}({args}) for which {calls}.",
    "Find the Python function {name}({args}): {calls}.",
    "Which function {name}({args}) gives this? {calls}.",
)
SHOWN = 4  # calls of a function that is told by examples
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
    if not 0 <= options.examples <= 1:
        return f"examples={options.examples} is no share of the Python functions, expected 0 to 1"
    if not options.languages or options.tables not in (1, 2):
        return f"languages={options.languages} and tables={options.tables}, expected at least one language and 1 or 2 tables"
    if options.languages != ["python"] and options.kinds == ["algorithm"]:
        return f"kinds=['algorithm'] is for Python alone, but languages={options.languages}; add one of {', '.join(KINDS)}"
    if "python" not in options.languages and 150 * options.max_number**options.operations >= 2**53:
        return f"max_number={options.max_number} with operations={options.operations} leaves what a double holds exactly, 2**53"
    if options.max_number < 2 or options.operations < 1 or options.tests < 4 or not options.kinds:
        return "a function needs max_number of at least 2, operations of at least 1, at least 4 tests and one of the kinds"
    return ""


def generate(rng: random.Random, count: int, documents: list[dict], options: Options) -> list[dict]:
    """`count` functions to write; `documents` are not used."""
    made = []
    for _ in range(count):
        language = draw(rng, options.languages)
        if language == "sql":
            question, answer, check = _sql.question(rng, options.tests, options.tables)
            made.append(prompt(question, answer, check))
        else:
            made.append(_function(rng, options) if language == "python" else _foreign(rng, language, options))
    return made


def _function(rng: random.Random, options: Options) -> dict:
    kind = rng.choice(options.kinds)
    if kind == "algorithm":
        return prompt(*_algorithms.question(rng, options.tests, partial(_asked, rng, options)))
    constant = lambda: rng.randint(2, options.max_number)  # noqa: E731
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
    reference = eval(f"lambda {', '.join(arguments)}: {expression}")  # our own expression, from the tables above

    def test() -> list[str]:
        values = _input(rng, kind)
        return [f"{name}({', '.join(map(repr, values))})", repr(reference(*values))]

    question = _asked(rng, options, name, ", ".join(arguments), what, test)
    tests = [test() for _ in range(options.tests)]
    source = f"def {name}({', '.join(arguments)}):\n    return {expression}\n"
    return prompt(question, f"```python\n{source}```", {"tests": tests})


def _asked(
    rng: random.Random, options: Options, name: str, args: str, what: str, test: Callable[[], list[str]]
) -> str:
    """The question: in words, or by calls and their results, which are drawn apart from the unit tests."""
    if options.examples and rng.random() < options.examples:
        calls = ", ".join(f"{call} = {result}" for call, result in (test() for _ in range(SHOWN)))
        return rng.choice(BY_EXAMPLE).format(name=name, args=args, calls=calls)
    return rng.choice(ASK).format(name=name, args=args, what=what)


def _foreign(rng: random.Random, language: str, options: Options) -> dict:
    """A function in another language: the same kinds, with what is exact in all of them."""
    own, kind = _languages.LANGUAGES[language], rng.choice([k for k in options.kinds if k != "algorithm"])
    n = rng.randint(2, options.max_number)
    arguments = rng.sample("xyuv", 2) if kind == "two_numbers" else [rng.choice(ARGUMENTS[kind][:1] + ARGUMENTS[kind][2:3])]
    seen = [own.variable.format(name=name) for name in arguments]
    if kind == "number":
        what, body, result = arguments[0], seen[0], "number"
        steps = [(rng.choice(NUMBER[:3]), rng.randint(2, options.max_number)) for _ in range(rng.randint(1, options.operations))]
        for step, ((words, code), n) in enumerate(steps):
            what = f"{what}{', ' if step else ' '}{words.format(n=n)}"
            body = code.format(e=f"({body})" if step else body, n=n)
        reference = eval(f"lambda {arguments[0]}: {body.replace(seen[0], arguments[0])}")
    else:
        words, key, _, result, function = rng.choice([o for o in _languages.OPERATIONS if o[2] == kind])
        small, c = kind == "text" or "first" in words, rng.choice("aeo")
        n = rng.randint(2, 4) if small else n
        what = words.format(a=arguments[0], b=arguments[-1], n=n, c=c)
        body = own.bodies[key].format(a=seen[0], b=seen[-1], n=n, c=c)
        reference = lambda *values: function(*values, n, c)  # noqa: E731
    name = rng.choice(NAMES[3:])
    inputs = [_input(rng, kind) for _ in range(options.tests)]
    tests = [[_languages.call(language, name, v), json.dumps(reference(*v))] for v in inputs]
    source = _languages.write(language, name, arguments, "number" if kind == "two_numbers" else kind, result, body)
    question = f"In {own.titles[0]}: {rng.choice(FOREIGN).format(name=name, args=', '.join(arguments), what=what)}"
    return prompt(question, f"```{own.titles[1]}\n{source}```", {"written_in": language, "tests": tests})


def _input(rng: random.Random, kind: str) -> tuple:
    if kind == "text":
        return ("".join(rng.choice("abcdeoABCE ") for _ in range(rng.randint(4, 8))),)
    if kind == "list":
        return ([rng.randint(-20, 120) for _ in range(rng.randint(4, 7))],)
    return tuple(rng.randint(-50, 150) for _ in range(2 if kind == "two_numbers" else 1))


def code_block(completion: str, language: str = "python") -> str | None:
    """The first fenced block that is of the language or says nothing else; None without one."""
    own = {"python": ("python", "py"), "sql": ("sql", "sqlite")}.get(language) or _languages.LANGUAGES[language].titles
    titles = {"", *(title.lower() for title in own)}
    blocks = re.findall(r"```([^\n`]*)\n(.*?)```", completion, re.DOTALL)
    return next((block for title, block in blocks if title.strip().lower() in titles), None)


def verify(prompt: dict, completion: str) -> float:
    """The fraction of unit tests passed, -1.0 without a code block. For many, `verify_batch` is far faster.

    Raises CuveeError when the prompt's language can't be run here.
    """
    return verify_batch([prompt], [completion])[0]


def verify_batch(prompts: list[dict], completions: list[str]) -> list[float]:
    """`verify` for many pairs in one round of the sandbox a language. In Python a test passes when the results' `repr` are
    equal, in SQL when the rows are, elsewhere when the results are."""
    scores, languages = [-1.0] * len(prompts), [p["check"].get("written_in", "python") for p in prompts]
    for language in sorted(set(languages)):
        blocks = {i: code_block(completions[i], language) for i, one in enumerate(languages) if one == language}
        found = {i: block for i, block in blocks.items() if block is not None}
        for i, score in zip(found, _passed(language, list(found.values()), [prompts[i]["check"] for i in found]), strict=True):
            scores[i] = score
    return scores


def _passed(language: str, blocks: list[str], checks: list[dict]) -> list[float]:
    if language == "sql":
        return _sql.passed(blocks, checks)
    calls = [[call for call, _ in check["tests"]] for check in checks]
    if language == "python":
        outcomes = sandbox.run([sandbox.Program(block, own) for block, own in zip(blocks, calls, strict=True)])
        values = [outcome.values for outcome in outcomes]
        wanted = [[result for _, result in check["tests"]] for check in checks]
    else:
        values = _languages.results(language, blocks, calls) if blocks else []
        wanted = [[json.loads(result) for _, result in check["tests"]] for check in checks]
    return [sum(map(_equal, got, want)) / max(1, len(want)) for got, want in zip(values, wanted, strict=True)]


def _equal(found: object, expected: object) -> bool:
    return type(found) is type(expected) and found == expected
