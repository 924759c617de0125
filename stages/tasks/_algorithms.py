"""Python functions of several lines, for models that have outgrown one expression: the `algorithm` kind of the code task."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

# What is asked, the argument, the function's body ({n}: a constant of 2 to 9), and what kind of input it takes.
FUNCTIONS = (
    ("whether {a} is a prime number", "x", "return {a} > 1 and all({a} % d for d in range(2, {a}))", "natural"),
    ("the sum of the digits of {a}", "x", "return sum(int(d) for d in str({a}))", "natural"),
    ("the factorial of {a}", "x", "r = 1\n    for i in range(2, {a} + 1):\n        r *= i\n    return r", "small"),
    ("the Fibonacci number with index {a}, where index 0 is 0 and index 1 is 1", "x",
     "p, q = 0, 1\n    for _ in range({a}):\n        p, q = q, p + q\n    return p", "small"),
    ("the list of the divisors of {a} in ascending order", "x", "return [d for d in range(1, {a} + 1) if {a} % d == 0]", "natural"),
    ("{a} in base {n} as a string of digits", "x",
     "r = ''\n    while {a}:\n        r = str({a} % {n}) + r\n        {a} //= {n}\n    return r or '0'", "natural"),
    ("the list of prime factors of {a} in ascending order, repeated ones as often as they divide it", "x",
     "r, d = [], 2\n    while {a} > 1:\n        while {a} % d == 0:\n            r.append(d)\n            {a} //= d\n        d += 1\n    return r", "natural"),
    ("whether {a} reads the same forwards and backwards", "s", "return {a} == {a}[::-1]", "word"),
    ("the words of {a} in reverse order, separated by single spaces", "s", "return ' '.join({a}.split()[::-1])", "text"),
    ("a dictionary from each word of {a} to its number of occurrences", "s",
     "r = {{}}\n    for w in {a}.split():\n        r[w] = r.get(w, 0) + 1\n    return r", "text"),
    ("{a} with every letter shifted {n} places in the alphabet, from z back to a", "s",
     "return ''.join(chr((ord(c) - 97 + {n}) % 26 + 97) for c in {a})", "word"),
    ("the number of vowels in {a}", "s", "return sum(c in 'aeiou' for c in {a})", "word"),
    ("{a} without its repeated items, the first of each kept in place", "xs",
     "r = []\n    for x in {a}:\n        if x not in r:\n            r.append(x)\n    return r", "list"),
    ("the second largest of the different values in {a}", "xs", "return sorted(set({a}))[-2]", "list"),
    ("the running sums of {a}", "xs", "r, t = [], 0\n    for x in {a}:\n        t += x\n        r.append(t)\n    return r", "list"),
    ("{a} cut into pieces of {n} items, the last one shorter where needed", "xs",
     "return [{a}[i:i + {n}] for i in range(0, len({a}), {n})]", "list"),
    ("{a} rotated {n} places to the left", "xs", "k = {n} % len({a})\n    return {a}[k:] + {a}[:k]", "list"),
    ("the largest difference of two neighbours in {a}", "xs", "return max(abs(p - q) for p, q in zip({a}, {a}[1:]))", "list"),
    ("the median of {a}, for an even number of items the lower one of the two in the middle", "xs",
     "return sorted({a})[(len({a}) - 1) // 2]", "list"),
    ("the length of the longest run of equal neighbours in {a}", "xs",
     "best = run = 1\n    for p, q in zip({a}, {a}[1:]):\n        run = run + 1 if p == q else 1\n        best = max(best, run)\n    return best", "list"),
)  # fmt: skip
NAMES = "f solve compute answer task routine process helper".split()
LETTERS = {"word": "abcaeiklmnoz", "text": "ab "}


def question(rng: random.Random, tests: int, ask: Callable[..., str]) -> tuple[str, str, dict]:
    """What is asked, the reference answer, and the check. ask: the question of (name, arguments, what it returns, a test's maker)."""
    words, argument, body, kind = rng.choice(FUNCTIONS)
    values, name = {"a": argument, "n": rng.randint(2, 9)}, rng.choice(NAMES)
    source = f"def {name}({argument}):\n    {body.format(**values)}\n"
    scope: dict[str, Any] = {}
    exec(source, scope)  # our own text, from the table above

    def test() -> list[str]:
        value = _input(rng, kind)
        return [f"{name}({value!r})", repr(scope[name](value))]

    found = [test() for _ in range(tests)]
    return ask(name, argument, words.format(**values), test), f"```python\n{source}```", {"tests": found}


def _input(rng: random.Random, kind: str) -> Any:
    if kind == "natural":
        return rng.randint(1, 200)
    if kind == "small":
        return rng.randint(0, 15)
    if kind == "list":
        return [1, *[rng.randint(-9, 30) for _ in range(rng.randint(3, 7))], 2]
    word = "".join(rng.choice(LETTERS[kind]) for _ in range(rng.randint(3, 9)))
    return rng.choice([word, word + word[::-1]]) if kind == "word" else f"a {word} b"
