"""Tools that run, for the agents' part of the rag task: each a pure function with a JSON schema, over a row's own texts.

`search` finds among the texts of the row's `check.texts`; the others need nothing. A result is a list of strings, each citable
as <co>span</co: call:[result]>.
"""

from __future__ import annotations

import ast
import datetime
import operator
import re
from collections.abc import Callable
from typing import Any

from stages.stage import CuveeError
from stages.tasks._common import json_in
from stages.tasks._retrieval import Chunk, Index

TOP = 3  # texts that a search gives
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv,
}  # fmt: skip
GRAMS = {"gram": 1, "kilogram": 1000, "tonne": 1000000, "ounce": 28.349523125, "pound": 453.59237}


def search(texts: list[str], query: str) -> list[str]:
    return [texts[i] for i in Index([Chunk(text) for text in texts]).search(query[:200], TOP)]


def calculate(texts: list[str], expression: str) -> list[str]:
    return [f"{_value(ast.parse(expression[:200], mode='eval').body):.10g}"]


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    raise ValueError("the calculator takes numbers, + - * / // and brackets")


def days_between(texts: list[str], start: str, end: str) -> list[str]:
    return [f"{(datetime.date.fromisoformat(end) - datetime.date.fromisoformat(start)).days} days"]


def weekday(texts: list[str], date: str) -> list[str]:
    return [
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()[datetime.date.fromisoformat(date).weekday()]
    ]


def convert_weight(texts: list[str], amount: float, unit: str, into: str) -> list[str]:
    return [f"{float(amount) * GRAMS[unit] / GRAMS[into]:.10g} {into}"]


_DATE = {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$", "description": "as YYYY-MM-DD"}
_UNIT = {"type": "string", "enum": list(GRAMS)}
# Name -> the function, what it does, and its parameters, all of which are required.
TOOLS: dict[str, tuple[Callable[..., list[str]], str, dict[str, Any]]] = {
    "search": (search, "Finds texts on a subject.", {"query": {"type": "string", "description": "what to look for", "minLength": 1}}),
    "calculate": (calculate, "The value of an arithmetic expression.", {"expression": {"type": "string", "description": "such as 2 * (3 + 4)"}}),
    "days_between": (days_between, "The number of days from one date to another.", {"start": _DATE, "end": _DATE}),
    "weekday": (weekday, "The day of the week of a date.", {"date": _DATE}),
    "convert_weight": (convert_weight, "A weight in another unit.", {"amount": {"type": "number"}, "unit": _UNIT, "into": _UNIT}),
}  # fmt: skip


def schema(name: str) -> dict[str, Any]:
    """The tool in Hugging Face's form, as a chat template takes it."""
    _, description, properties = TOOLS[name]
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def run(name: str, arguments: dict[str, Any], texts: list[str]) -> list[str]:
    """What the tool gives. Raises ValueError for a tool that is not known and for arguments that it can't take."""
    if name not in TOOLS or fault(arguments, schema(name)["function"]["parameters"]):
        raise ValueError(f"{name} is no tool, or {arguments} are not its parameters")
    try:
        return TOOLS[name][0](texts, **arguments)
    except (ArithmeticError, SyntaxError, RecursionError, MemoryError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from None


def fault(value: Any, schema: dict[str, Any]) -> str:
    """What is wrong with a JSON value by its JSON schema, "" if nothing. Raises CuveeError for a schema that is none."""
    from jsonschema import Draft202012Validator

    try:
        error = next(iter(Draft202012Validator(schema).iter_errors(value)), None)
    except Exception as wrong:  # whatever a wrong schema leads to
        said = f"{type(wrong).__name__}: {' '.join(str(wrong).split())[:200]}"
        raise CuveeError(f"a prompt's JSON schema (check.schema or tools) is none: {said}; mend it, draft 2020-12 is meant") from None
    return error.message[:200] if error else ""


def calls(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """The calls of a response, name and arguments: JSON objects of Command A's form ({"tool_name", "parameters"}) or Hugging Face's
    ({"name", "arguments"}), in a list or one after another; or ReAct's lines `Action:` and `Action Input:`. None without any."""
    react = re.findall(r"Action: *(\w+)[ \t]*\nAction Input: *(.+)", text)
    if react:
        return [(name, found if isinstance(found := next(json_in(given), None), dict) else {}) for name, given in react]
    found = [one for value in json_in(text) for one in (value if isinstance(value, list) else [value])]
    pairs = [(c.get("tool_name", c.get("name")), c.get("parameters", c.get("arguments"))) for c in found if isinstance(c, dict)]
    return [(name, given) for name, given in pairs if isinstance(name, str) and isinstance(given, dict)] or None
