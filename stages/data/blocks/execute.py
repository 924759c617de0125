"""Code that shows what it does: self-contained Python functions are run on generated inputs, the outcome is appended.

Command A trains on such documents (arXiv 2504.00698, section 2.1). Functions are those at the top of a file that need
nothing but the file; inputs follow the annotations, or the names, of the arguments. They run in the sandbox.
"""

import ast
import random
from dataclasses import dataclass
from hashlib import sha256

from stages import sandbox
from stages.data.document import Document
from stages.stage import option

NAMES = {name: kind for kind, found in {"str": "text string name word s", "list": "items values numbers",
                                        "int": "n x y a b k count number size"}.items() for name in found.split()}  # fmt: skip
PURE = set("math re string itertools functools collections typing json operator statistics textwrap __future__".split())
WORDS = "river stone Garden 42 window, letter! Tea north-east abc".split()


@dataclass
class Config:
    functions: int = option(4, "most functions of a file that are run")
    calls: int = option(3, "inputs for each function")
    min_calls: int = option(2, "fewest calls of a function that must return a value to be shown")
    seed: int = option(0, "seed of the inputs")


def filter(documents: list[Document], config: Config) -> list[str]:
    """Appends in place and removes nothing."""
    programs, owners = [], []
    for i, document in enumerate(documents):
        if document.domain == "code" and document.id.partition("#")[0].endswith(".py"):
            for calls in _calls(document, config):
                programs.append(sandbox.Program(document.text, calls))
                owners.append(i)
    shown: dict[int, list[str]] = {}
    for i, program, outcome in zip(owners, programs, sandbox.run(programs), strict=True):
        if outcome.status != "ok":  # how far it came before a limit is the machine's affair
            continue
        lines = [f">>> {call}\n{value}" for call, value in zip(program.calls, outcome.values, strict=True)
                 if value is not None and value != "None" and len(value) < 500 and " at 0x" not in value]
        if len(lines) >= config.min_calls:
            shown.setdefault(i, []).extend(lines)
    for i, lines in shown.items():
        text = "\n".join(lines).replace("\n", "\n# ")
        documents[i].text = f"{documents[i].text.rstrip()}\n\n# {text}\n"
    return [""] * len(documents)


def _calls(document: Document, config: Config) -> list[list[str]]:
    """Calls of each function that can be called with made-up inputs."""
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    if any(isinstance(node, (ast.Import, ast.ImportFrom)) and not _standard(node) for node in ast.walk(tree)):
        return []
    rng = random.Random(sha256(f"{config.seed}:{document.text}".encode()).digest())
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.decorator_list and not node.name.startswith("_"):
            kinds = _arguments(node)
            if kinds:
                inputs = [", ".join(_value(kind, rng) for kind in kinds) for _ in range(config.calls)]
                found.append([f"{node.name}({one})" for one in dict.fromkeys(inputs)])
    return found[: config.functions]


def _standard(node: ast.Import | ast.ImportFrom) -> bool:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return not getattr(node, "level", 0) and all(name.partition(".")[0] in PURE for name in names)


def _arguments(node: ast.FunctionDef) -> list[str]:
    """The kinds of all arguments without a default; none where one is unknown."""
    arguments = node.args.posonlyargs + node.args.args
    needed = arguments[: len(arguments) - len(node.args.defaults)]
    if node.args.kwonlyargs or node.args.vararg and not needed:
        return []
    try:
        kinds = [ast.unparse(one.annotation) if one.annotation else NAMES.get(one.arg, "") for one in needed]
    except RecursionError:  # Python parses deeper than it unparses
        return []
    return kinds if all(_known(kind) for kind in kinds) else []


def _known(kind: str) -> bool:
    return kind in ("int", "float", "str", "bool", "list") or kind.startswith("list[") and _known(kind[5:-1])


def _value(kind: str, rng: random.Random) -> str:
    if kind.startswith("list"):
        inner = kind[5:-1] if kind != "list" else "int"
        return f"[{', '.join(_value(inner, rng) for _ in range(rng.randint(0, 5)))}]"
    if kind == "str":
        return repr(" ".join(rng.choices(WORDS, k=rng.randint(1, 3))))
    return {"int": str(rng.randint(-3, 20)), "float": str(round(rng.uniform(-5, 20), 2)), "bool": str(rng.random() < 0.5)}[kind]
