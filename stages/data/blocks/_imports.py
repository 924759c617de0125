"""What a file of code is called by others, and what it asks for: Python modules, JavaScript and TypeScript paths, C includes."""

from __future__ import annotations

import posixpath
import re

PYTHON = (".py", ".pyi")
SCRIPT = (".js", ".jsx", ".mjs", ".cjs", ".ts", ".tsx", ".vue")
C = (".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hh", ".cu", ".cuh", ".m", ".mm")
ROOTS = ("src/", "lib/", "include/", "python/")  # folders that are no part of a module's name

_FROM = re.compile(r"^[ \t]*from[ \t]+(\.*)([\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#;]*)", re.MULTILINE)
_IMPORT = re.compile(r"^[ \t]*import[ \t]+([^\n#;]+)", re.MULTILINE)
_SCRIPT = re.compile(r"""(?:\bfrom|\bimport|\brequire\s*\(|\bimport\s*\()\s*["'](\.[^"'\n]*)["']""")
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)


def names(path: str) -> set[str]:
    """The names of the file at `path`, relative to its repository; "" for a language that is not read."""
    stem, ending = posixpath.splitext(path)
    if ending in PYTHON:
        own, last = "py:", "__init__"
    elif ending in SCRIPT:
        own, last = "js:", "index"
    elif ending in C:
        return {f"c:{one}" for one in _rooted(path)}
    else:
        return set()
    stem = posixpath.dirname(stem) if posixpath.basename(stem) == last else stem
    return {own + one for one in (_rooted(stem) if own == "py:" else {stem})}


def asked(path: str, text: str) -> set[str]:
    """The names that the file asks for; most of other packages, which no file has."""
    ending, folder = posixpath.splitext(path)[1], posixpath.dirname(path)
    if ending in PYTHON:
        return {f"py:{one}" for one in _python(folder, text)}
    if ending in SCRIPT:
        found = (posixpath.normpath(posixpath.join(folder, one)) for one in _SCRIPT.findall(text))
        return {f"js:{posixpath.splitext(one)[0] if one.endswith(SCRIPT) else one}" for one in found}
    if ending in C:
        found = _INCLUDE.findall(text)
        return {f"c:{posixpath.normpath(one)}" for name in found for one in (posixpath.join(folder, name), name)}
    return set()


def _rooted(path: str) -> set[str]:
    return {path, *(path[len(root) :] for root in ROOTS if path.startswith(root))}


def _python(folder: str, text: str) -> set[str]:
    found = set()
    for dots, module, imported in _FROM.findall(text):
        base = folder
        for _ in dots[1:]:
            base = posixpath.dirname(base)
        path = posixpath.join(base if dots else "", module.replace(".", "/"))
        members = [part.split()[0] for part in imported.strip("() \t").replace("\n", " ").split(",") if part.split()]
        for one in [path, *(posixpath.join(path, member) for member in members)]:
            found |= {one} if dots else {one, posixpath.join(folder, one)}
    for line in _IMPORT.findall(text):
        for part in line.split(","):
            one = part.split()[0].replace(".", "/") if part.split() else ""
            found |= {one, posixpath.join(folder, one)}
    return {one for one in found if one}
