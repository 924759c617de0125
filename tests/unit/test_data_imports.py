"""Repositories along the import graph: what each language asks for, cycles, several repositories, limits, crashes."""

from __future__ import annotations

import json
import random

import pytest

from stages.data import corpus, curate, join
from stages.data.blocks import _imports, imports
from stages.data.document import Document
from stages.data.engine import select
from stages.stage import ConfigError, Context, parse

from test_data_curate import prose  # isort: skip


def linearised(files: dict[str, str], **values) -> tuple[list[list[str]], list[str]]:
    """The paths of each long document in order, and the verdicts."""
    documents = [Document(f"src/{path}", text, "code") for path, text in sorted(files.items())]
    reasons = select("imports", documents, imports.Config(**values))
    kept = [document for document, reason in zip(documents, reasons, strict=True) if not reason]
    heads = [[line.split(" ", 1)[1] for line in one.text.split("\n") if line.startswith(("# ", "// "))] or [one.id[4:]] for one in kept]
    return heads, reasons


PYTHON = {
    "tool/app.py": "import os, json\nfrom tool.core import engine as e, config\nfrom . import helpers\n",
    "tool/core/__init__.py": "",
    "tool/core/engine.py": "from ..helpers import (\n    one,\n    two,\n)\nimport tool.core.config\n",
    "tool/core/config.py": "x = 1\n",
    "tool/helpers.py": "from __future__ import annotations\n",
    "tool/aaa.py": "import tool.app\n",
}


def test_python():
    heads, reasons = linearised({f"repo/{path}": text for path, text in PYTHON.items()})
    (order,) = heads
    assert sorted(order) == sorted(PYTHON)
    before = [("tool/core/config.py", "tool/core/engine.py"), ("tool/helpers.py", "tool/core/engine.py"), ("tool/core/engine.py", "tool/app.py"),
              ("tool/helpers.py", "tool/app.py"), ("tool/core/__init__.py", "tool/app.py"), ("tool/app.py", "tool/aaa.py")]  # fmt: skip
    assert all(order.index(a) < order.index(b) for a, b in before)
    assert [reason.partition(":")[0] for reason in reasons].count("linearised") == len(PYTHON) - 1


@pytest.mark.parametrize("path, text, expected", [
    ("a/b.ts", "import x from './x'\nimport '../y.js'\nimport React from 'react'\nexport * from './z'", {"js:a/x", "js:y", "js:a/z"}),
    ("a/b.js", 'const x = require("./x.mjs"), y = await import("./deep/y")', {"js:a/x", "js:a/deep/y"}),
    ("a/b.c", '#include <stdio.h>\n#  include "x.h"\n#include "../inc/y.h"', {"c:a/x.h", "c:x.h", "c:inc/y.h", "c:../inc/y.h"}),
    ("b.py", "import a.b as c, d\n", {"py:a/b", "py:d"}), ("p/b.py", "from .. import x", {"py:x"}), ("b.go", 'import "x"', set()),
])  # fmt: skip
def test_what_is_asked_for(path, text, expected):
    assert _imports.asked(path, text) == expected


def test_names():
    assert _imports.names("src/a/__init__.py") == {"py:src/a", "py:a"} and _imports.names("a/index.tsx") == {"js:a"}
    assert _imports.names("include/a/b.h") == {"c:include/a/b.h", "c:a/b.h"} and _imports.names("a.go") == set()


def test_scripts_and_headers():
    files = {"web/index.ts": "import {a} from './lib/a'\n", "web/lib/a.ts": "import b from '../b'\n", "web/b/index.js": "export default 1\n",
             "c/main.c": '#include "util.h"\n', "c/include/util.h": '#include "base.h"\n', "c/include/base.h": "int x;\n"}  # fmt: skip
    heads, _ = linearised(files)
    assert heads == [["include/base.h", "include/util.h", "main.c"], ["b/index.js", "lib/a.ts", "index.ts"]]


def test_cycles_are_broken_the_same_way_every_time():
    files = {"r/a.py": "import b\n", "r/b.py": "import c\n", "r/c.py": "import a\n", "r/d.py": "import a\n"}
    assert linearised(files)[0] == [["c.py", "b.py", "a.py", "d.py"]]
    assert linearised({"r/a.py": "import a\n", "r/b.py": "x = 1\n"})[0] == [["a.py", "b.py"]]


@pytest.mark.parametrize("rows", [join.ROWS, 200])
def test_no_file_stands_before_what_it_asks_for(monkeypatch, rows):
    """A random graph without cycles in each of ten repositories: every import is met, across parts of the join."""
    monkeypatch.setattr(join, "ROWS", rows)
    rng, files, asks = random.Random(0), {}, {}
    for repository in range(10):
        ranks = rng.sample(range(30), 30)
        for i in range(30):
            asks[repository, i] = [j for j in range(30) if ranks[j] < ranks[i] and rng.random() < 0.1]
            files[f"r{repository}/m{i}.py"] = "".join(f"import m{j}\n" for j in asks[repository, i]) + f"x = {i}\n"
    heads, _ = linearised(files)
    assert len(heads) == 10
    for repository, order in enumerate(heads):
        assert len(order) == 30
        assert all(order.index(f"m{j}.py") < order.index(f"m{i}.py") for i in range(30) for j in asks[repository, i])


def test_limits_and_what_stays_alone():
    files = {f"r/{i}.py": f"value = {'x' * 50}{i}\n" for i in range(10)} | {"alone/a.py": "x = 1\n", "loose.py": "y = 1\n"}
    heads, _ = linearised(files, max_bytes=240)
    assert [len(one) for one in heads] == [1, 1, 3, 3, 3, 1] and heads[0] == ["alone/a.py"] and heads[1] == ["loose.py"]
    assert len(linearised(files, depth=0)[0]) == 1
    documents = [Document("s/a.jsonl#1", "import b\n", "code"), Document("s/r/a.txt", prose(1))]
    assert select("imports", documents) == ["", ""] and select("imports", []) == []
    with pytest.raises(ConfigError, match="depth -1 must be"):
        imports.check(imports.Config(depth=-1))


def test_a_folder_of_repositories_through_the_engine(tmp_path):
    for path, text in PYTHON.items():
        file = tmp_path / "code" / "repo" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + f"def {file.stem}_of_{file.parent.stem}(value):\n    return value\n" * 20)
    (tmp_path / "code" / "README.md").write_text(prose(1))
    found = []
    for workers in (1, 2):
        out, scratch = tmp_path / f"out{workers}", tmp_path / f"scratch{workers}"
        out.mkdir()
        scratch.mkdir()
        values = {"sources": [str(tmp_path / "code")], "blocks": ["exact", "imports", "split"], "options": {"split": {"heldout": 0}}}
        config = parse(curate.Config, {**values, "workers": workers}, "data")
        curate.check(config, {})
        curate.run(config, {}, out, Context(scratch))
        found.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert found[0] == found[1]
    kept = {row["id"]: row["text"] for row in corpus.documents(tmp_path / "out1", "train")}
    (text,) = (text for name, text in kept.items() if name.endswith(".py"))
    assert len(kept) == 2 and kept["code/README.md"] == prose(1)
    assert text.index("# tool/core/config.py") < text.index("# tool/core/engine.py") < text.index("# tool/app.py") < text.index("# tool/aaa.py")
    assert json.loads((tmp_path / "out1" / "table.json").read_text())["blocks"][2]["removed"] == 5
    with pytest.raises(ConfigError, match="'split' stands before 'imports'"):
        curate.check(parse(curate.Config, {"blocks": ["split", "imports"]}, "data"), {})
