"""Exercises with exact answers, in graded levels: what the math task has besides stories.

Each topic is a function of a random generator and a level (1: small numbers, one step; 2: larger ones or two steps; 3: what takes a
method), which gives the question, the working and the value as LaTeX.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

Exercise = tuple[str, str, str]


def _latex(value: Fraction | int) -> str:
    value = Fraction(value)
    sign = "-" if value < 0 else ""
    return f"{value}" if value.denominator == 1 else f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _signed(value: int) -> str:
    return f"+ {value}" if value >= 0 else f"- {-value}"


def expressions(rng: random.Random, level: int) -> Exercise:
    """An expression with brackets and precedence."""
    top = (10, 50, 200)[level - 1]
    text, value, weak = str(first := rng.randint(2, top)), first, False
    working = []
    for _ in range(level + 1):
        symbol, n = rng.choice("+-*"), rng.randint(2, top if level < 3 else 30)
        inner = f"({text})" if symbol == "*" and weak else text
        after = value + n if symbol == "+" else value - n if symbol == "-" else value * n
        working.append(f"{value} {symbol} {n} = {after}")
        text, value, weak = f"{inner} {symbol} {n}", after, symbol != "*"
    return f"Calculate {text}.", ". ".join(working), str(value)


def fractions(rng: random.Random, level: int) -> Exercise:
    """A sum, difference, product or quotient of fractions."""
    top = (6, 12, 30)[level - 1]
    p, q = (Fraction(rng.randint(1, top), rng.randint(2, top)) for _ in range(2))
    symbol = rng.choice("+-*:"[: 2 * min(level, 2)])
    value = {"+": p + q, "-": p - q, "*": p * q, ":": p / q}[symbol]
    shared = math.lcm(p.denominator, q.denominator)
    if symbol in "+-":
        a, b = p * shared, q * shared
        working = f"Over {shared}: {a} {symbol} {b} = {a + b if symbol == '+' else a - b}"
    else:
        working = f"{p} {symbol} {q} = {value}"
    return f"What is {p} {symbol} {q} as a fraction in lowest terms?", working, _latex(value)


def linear(rng: random.Random, level: int) -> Exercise:
    """An equation in one unknown; at level 3 two equations in two, of which one unknown is asked for."""
    x, y = (rng.randint(-9, 12) for _ in range(2))
    if level == 3:
        while True:
            a, b, c, d = (rng.choice([-4, -3, -2, 2, 3, 4, 5]) for _ in range(4))
            if a * d != b * c:
                break
        e, f = a * x + b * y, c * x + d * y
        question = f"Solve {a}x {_signed(b)}y = {e} and {c}x {_signed(d)}y = {f}. What is x?"
        return (
            question,
            f"x = ({e} * {d} - {b} * {f}) / ({a} * {d} - {b} * {c}) = {e * d - b * f} / {a * d - b * c} = {x}",
            str(x),
        )
    a, b = rng.randint(2, 9), rng.randint(-20, 20)
    c = 0 if level == 1 else rng.choice([k for k in range(-5, 6) if k not in (0, a)])
    left, right = f"{a}x {_signed(b)}", f"{c}x {_signed(a * x + b - c * x)}" if c else str(a * x + b)
    return f"Solve {left} = {right} for x.", f"{a - c}x = {(a - c) * x}. x = {x}", str(x)


def quadratic(rng: random.Random, level: int) -> Exercise:
    """The larger root, the sum or the product of the roots."""
    p, q = sorted(rng.sample(range(-9, 10), 2))
    k = 1 if level == 1 else rng.randint(2, 5)
    b, c = -k * (p + q), k * p * q
    equation = f"{k if k > 1 else ''}x^2 {_signed(b)}x {_signed(c)} = 0"
    if level == 3 and rng.random() < 0.5:
        return (
            f"What is the sum of the squares of the roots of {equation}?",
            f"{p}^2 + {q}^2 = {p * p + q * q}",
            str(p * p + q * q),
        )
    return (
        f"What is the larger root of {equation}?",
        f"(x {_signed(-p)})(x {_signed(-q)}) = 0. x = {p} or x = {q}. The larger is {q}",
        str(q),
    )


def number_theory(rng: random.Random, level: int) -> Exercise:
    """Greatest common divisors, least common multiples, remainders."""
    top = (40, 200, 2000)[level - 1]
    a, b = (rng.randint(4, top) for _ in range(2))
    kind = rng.choice(("gcd", "lcm", "remainder"))
    if kind == "remainder" and level == 3:
        exponent, modulus = rng.randint(5, 40), rng.randint(3, 23)
        value = pow(a, exponent, modulus)
        return (
            f"What is the remainder of {a}^{exponent} divided by {modulus}?",
            f"{a} mod {modulus} = {a % modulus}. {a % modulus}^{exponent} mod {modulus} = {value}",
            str(value),
        )
    if kind == "remainder":
        b = rng.randint(3, 9 * level)
        return (
            f"What is the remainder of {a} divided by {b}?",
            f"{a} = {a // b} * {b} + {a % b}. The remainder is {a % b}",
            str(a % b),
        )
    g = math.gcd(a, b)
    if kind == "gcd":
        return (
            f"What is the greatest common divisor of {a} and {b}?",
            f"{a} = {a // g} * {g}. {b} = {b // g} * {g}. It is {g}",
            str(g),
        )
    return (
        f"What is the least common multiple of {a} and {b}?",
        f"gcd = {g}. {a} * {b} / {g} = {a * b // g}",
        str(a * b // g),
    )


def percent(rng: random.Random, level: int) -> Exercise:
    """Percentages, and changes by them."""
    base, rate = rng.randint(2, 20 * level) * 20, rng.randint(1, 19) * 5
    if level == 1:
        value = Fraction(base * rate, 100)
        return f"What is {rate} % of {base}?", f"{base} * {rate} / 100 = {value}", _latex(value)
    sign, word = rng.choice(((1, "raised"), (-1, "lowered")))
    after = Fraction(base * (100 + sign * rate), 100)
    working = f"{base} * {100 + sign * rate} / 100 = {after}"
    if level == 2:
        return f"A price of {base} is {word} by {rate} %. What is it now?", working, _latex(after)
    return (
        f"A price was {word} by {rate} % and is now {after}. What was it before?",
        f"{after} * 100 / {100 + sign * rate} = {base}",
        str(base),
    )


def derivatives(rng: random.Random, level: int) -> Exercise:
    """The derivative of a polynomial, at level 1 at a point."""
    powers = sorted(rng.sample(range(1, 3 + level), min(3, 1 + level)), reverse=True)
    terms = [(rng.choice([-5, -3, -2, 2, 3, 4, 7]), p) for p in powers]

    def write(parts: list[tuple[int, int]]) -> str:
        words = (f"{_signed(c)}{'' if p == 0 else 'x' if p == 1 else f'x^{p}'}" for c, p in parts)
        return " ".join(words).removeprefix("+ ")

    derived = [(c * p, p - 1) for c, p in terms]
    if level == 1:
        x = rng.randint(-3, 4)
        value = sum(c * x**p for c, p in derived)
        return (
            f"What is the derivative of {write(terms)} at x = {x}?",
            f"The derivative is {write(derived)}. At {x} it is {value}",
            str(value),
        )
    return f"What is the derivative of {write(terms)} with respect to x?", "Term by term", write(derived)


def counting(rng: random.Random, level: int) -> Exercise:
    """Choices, arrangements, and chances."""
    n = rng.randint(3, 5 + 2 * level)
    k = rng.randint(2, min(n - 1, 2 + level))
    if level == 1:
        return (
            f"In how many orders can {n} books stand on a shelf?",
            " * ".join(map(str, range(n, 0, -1))) + f" = {math.factorial(n)}",
            str(math.factorial(n)),
        )
    if level == 2:
        return (
            f"In how many ways can {k} of {n} people be chosen?",
            f"{n}! / ({k}! * {n - k}!) = {math.comb(n, k)}",
            str(math.comb(n, k)),
        )
    red, k = rng.randint(2, n), 2
    value = Fraction(math.comb(red, k), math.comb(red + n, k))
    return (f"A bag holds {red} red and {n} blue balls. Two are taken at once. What is the probability that both are red?",
            f"{math.comb(red, 2)} of {math.comb(red + n, 2)} pairs", _latex(value))  # fmt: skip


def sequences(rng: random.Random, level: int) -> Exercise:
    """The next term of an arithmetic or geometric sequence, the n-th, or a sum."""
    a, d, n = rng.randint(1, 20), rng.randint(2, 9), rng.randint(8, 40)
    if level == 1:
        ratio = rng.random() < 0.4
        terms = [a * (d**i if ratio else 1) + (0 if ratio else d * i) for i in range(5)]
        return (
            f"What comes next: {', '.join(map(str, terms[:4]))}?",
            f"{terms[3]} {'*' if ratio else '+'} {d} = {terms[4]}",
            str(terms[4]),
        )
    last = a + d * (n - 1)
    head = f"A sequence begins {a}, {a + d}, {a + 2 * d} and goes on in equal steps."
    if level == 2:
        return f"{head} What is its term number {n}?", f"{a} + {n - 1} * {d} = {last}", str(last)
    return (
        f"{head} What is the sum of its first {n} terms?",
        f"{n} * ({a} + {last}) / 2 = {n * (a + last) // 2}",
        str(n * (a + last) // 2),
    )


def geometry(rng: random.Random, level: int) -> Exercise:
    """Areas, sides and angles."""
    a, b = rng.randint(2, 12 * level), rng.randint(2, 12 * level)
    if level == 1:
        return (
            f"A rectangle has sides of {a} cm and {b} cm. What is its area in square centimetres?",
            f"{a} * {b} = {a * b}",
            str(a * b),
        )
    if level == 2:
        return (
            f"A triangle has a base of {a} cm and a height of {b} cm. What is its area in square centimetres?",
            f"{a} * {b} / 2",
            _latex(Fraction(a * b, 2)),
        )
    m, n = sorted(rng.sample(range(1, 8), 2))
    k = rng.randint(1, 3)
    p, q, r = k * (n * n - m * m), 2 * k * m * n, k * (n * n + m * m)
    return (
        f"A right triangle has legs of {p} cm and {q} cm. How long is its hypotenuse in centimetres?",
        f"{p}^2 + {q}^2 = {r * r} = {r}^2",
        str(r),
    )


TOPICS: dict[str, Callable[[random.Random, int], Exercise]] = {
    one.__name__: one
    for one in (
        expressions,
        fractions,
        linear,
        quadratic,
        number_theory,
        percent,
        derivatives,
        counting,
        sequences,
        geometry,
    )
}
