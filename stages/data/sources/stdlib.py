"""The running interpreter's standard library: its files as code, its docstrings and language reference as prose."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from itertools import islice
from typing import Any

from stages.data.document import Document
from stages.data.formats.text import decode
from stages.data.sources import _files
from stages.data.sources._files import Entry
from stages.stage import CuveeError

# Tests are broken on purpose, third-party packages differ from machine to machine, so do _sysconfigdata files.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TOPICS = "pydoc_data/topics.py"
Definition = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def entries(source: str) -> list[Entry]:
    """The library's Python files, sorted by name. Raises CuveeError where they are not on disk."""
    root = sysconfig.get_paths()["stdlib"]
    found = [entry for entry in _files.entries(root, SKIPPED) if entry.kind == ".py"]
    found = [entry for entry in found if "_sysconfigdata" not in entry.name]
    if not found:
        raise CuveeError(f"data.sources: stdlib finds no Python files in {root}; name a folder of your own")
    for entry in found:
        entry.always = entry.name == TOPICS
    return found


def documents(files: list[Entry]) -> Iterator[Document]:
    """Two documents a module, its source and its docstrings, and in between the topics of the language reference.

    A limit cuts the end, so that a small corpus has some of each.
    """
    topics = iter(())
    for entry in files:
        with entry.open() as file:
            text = decode(file.read())
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # a file with old syntax, on purpose
            yield Document(entry.name, text, "code", fault="source does not parse")
            continue
        if entry.name == TOPICS:
            topics = iter(sorted(_topics(tree).items()))
            continue
        yield Document(entry.name, text, "code", group=entry.name)
        module = entry.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if page := "\n\n".join(_docstrings(tree, module)):
            yield Document(f"{entry.name}#docstrings", page + "\n", "prose", "en", group=entry.name)
        yield from map(_topic, islice(topics, 1))
    yield from map(_topic, topics)


def _topic(item: tuple[str, str]) -> Document:
    return Document(f"{TOPICS}#{item[0]}", item[1].strip() + "\n", "prose", "en")


def _topics(tree: ast.Module) -> dict[str, str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


def _docstrings(node: Any, name: str) -> Iterator[str]:
    """`name` and docstring of a module, class or function, then of what it defines, in the order of the file."""
    if text := ast.get_docstring(node):
        yield f"{name}\n\n{text}"
    for child in getattr(node, "body", []):
        if isinstance(child, Definition):
            yield from _docstrings(child, f"{name}.{child.name}")
