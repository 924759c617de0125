"""SQL queries from a description, run on several databases of SQLite: the SQL part of the code task."""

from __future__ import annotations

import ast
import random
import sqlite3

from stages import sandbox

KINDS = ("fruit", "tool", "toy", "book")
NAMES = "apple hammer doll atlas pear saw kite novel plum drill ball comic fig file robot diary".split()
TABLES = ("Table items(name, kind, price, stock).", "Table orders(item, amount); item is a name in items.")
SCHEMA = "CREATE TABLE items(name TEXT, kind TEXT, price INTEGER, stock INTEGER); CREATE TABLE orders(item TEXT, amount INTEGER);"
ASK = ("Write an SQL query for {w}.", "Query {w} in SQL.", "Give the SQL for {w}.")
# What is asked, its query, the number of tables it needs, and whether the order of its rows is asked for.
QUERIES = (
    ("the names of items of kind {k}", "SELECT name FROM items WHERE kind = '{k}'", 1, False),
    ("the names of items with a price above {n}", "SELECT name FROM items WHERE price > {n}", 1, False),
    ("the number of items with a price above {n}", "SELECT count(*) FROM items WHERE price > {n}", 1, False),
    ("the sum of stock of kind {k}", "SELECT sum(stock) FROM items WHERE kind = '{k}'", 1, False),
    ("the name of the item with the highest price", "SELECT name FROM items ORDER BY price DESC LIMIT 1", 1, False),
    ("all names from the lowest price to the highest", "SELECT name FROM items ORDER BY price", 1, True),
    ("each kind and its number of items", "SELECT kind, count(*) FROM items GROUP BY kind", 1, False),
    ("each kind and its highest price", "SELECT kind, max(price) FROM items GROUP BY kind", 1, False),
    ("the kinds with a sum of stock above {n}", "SELECT kind FROM items GROUP BY kind HAVING sum(stock) > {n}", 1, False),
    ("each ordered item's name and its sum of amounts", "SELECT item, sum(amount) FROM orders GROUP BY item", 2, False),
    ("the price of each order with an amount above {n}",
     "SELECT price FROM orders JOIN items ON item = name WHERE amount > {n}", 2, False),
    ("the names of items that were never ordered", "SELECT name FROM items WHERE name NOT IN (SELECT item FROM orders)", 2, False),
    ("the sum of amounts ordered of kind {k}", "SELECT sum(amount) FROM orders JOIN items ON item = name WHERE kind = '{k}'", 2, False),
)  # fmt: skip


def question(rng: random.Random, tests: int, tables: int) -> tuple[str, str, dict]:
    """What is asked, the query, and the check, with `tests` databases. tables: 1, or 2 for joins as well."""
    what, query, needed, ordered = rng.choice([q for q in QUERIES if q[2] <= tables])
    values = {"k": rng.choice(KINDS), "n": rng.randint(5, 60)}
    query = query.format(**values)
    setups = [_database(rng) for _ in range(tests)]
    rows = []
    for setup in setups:
        database = sqlite3.connect(":memory:")
        database.executescript(setup)
        rows.append(repr(database.execute(query).fetchall()))
        database.close()
    text = f"{' '.join(TABLES[:needed])}\n{rng.choice(ASK).format(w=what.format(**values))}"
    check = {"written_in": "sql", "tests": [list(t) for t in zip(setups, rows, strict=True)], "ordered": ordered}
    return text, f"```sql\n{query};\n```", check


def _database(rng: random.Random) -> str:
    names = rng.sample(NAMES, 8)
    kinds = [*KINDS, *rng.choices(KINDS, k=4)]
    prices, stocks = rng.sample(range(1, 100), 8), [rng.randint(1, 40) for _ in names]
    items = ", ".join(f"('{n}', '{k}', {p}, {s})" for n, k, p, s in zip(names, kinds, prices, stocks, strict=True))
    ordered = [*names[:4], *rng.choices(names[:7], k=4)]  # each kind once at least, one item never
    orders = ", ".join(f"('{n}', {rng.randint(1, 90)})" for n in ordered)
    return f"{SCHEMA} INSERT INTO items VALUES {items}; INSERT INTO orders VALUES {orders};"


def passed(queries: list[str], checks: list[dict]) -> list[float]:
    """The share of each check's databases on which its query gives the expected rows, in any order unless one is asked."""
    outcomes = sandbox.run(
        [
            sandbox.Query(query, [setup for setup, _ in check["tests"]])
            for query, check in zip(queries, checks, strict=True)
        ]
    )
    return [
        sum(
            _same(value, rows, check.get("ordered", False))
            for value, (_, rows) in zip(outcome.values, check["tests"], strict=True)
        )
        / max(1, len(check["tests"]))
        for outcome, check in zip(outcomes, checks, strict=True)
    ]


def _same(value: str | None, expected: str, ordered: bool) -> bool:
    if value is None or ordered or value == expected:
        return value == expected
    try:
        return sorted(map(repr, ast.literal_eval(value))) == sorted(map(repr, ast.literal_eval(expected)))
    except (ValueError, SyntaxError):  # cut off: a result of more than 10,000 characters
        return False
