"""Blocks that web crawls, code and mixtures need, each alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from stages.data import corpus, curate
from stages.data.blocks import (
    c4,
    classifier,
    encoding,
    execute,
    fineweb,
    gopher,
    licence,
    lines,
    mix,
    pii,
    repetition,
)
from stages.data.document import Document
from stages.data.engine import select
from stages.data.words import Words
from stages.stage import ConfigError, Context, CuveeError, parse

from test_data_blocks import RIGHTS, THAI  # isort: skip
from test_data_curate import prose  # isort: skip


def cleaned(block, text, config=None, **values):
    document = Document("d.py", text, **values)
    return block.clean(document, config or block.Config()), document.text


def words_of(text):
    found = Words([text])
    return [text[a:b] for a, b in zip(found.starts - 1, found.ends - 1, strict=True)]


@pytest.mark.parametrize("text, expected", [
    ("Don't well-known 3.5 (foo) a, b.", "Don 't well - known 3.5 ( foo ) a , b ."),
    ("see https://a.org/b-c?d=1, e.g. U.S. law...", "see https://a.org/b-c?d=1 , e.g. U.S. law ..."),
    ("utf-8 1-based snake_case x=1 and/or -1 /etc", "utf-8 1 - based snake_case x=1 and / or -1 /etc"),
    ("我爱Python。", "我 爱 Python 。"),
    ("", ""), ("   \n", ""), ("...", "..."),
])
def test_words(text, expected):
    assert " ".join(words_of(text)) == expected


def naive_repetition(text: str, scale: float = 1.0) -> set[str]:
    """The rules as they are written, one after the other, on the same words."""
    words, broken = words_of(text), set()
    for n, limit in repetition.TOP.items():
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        if grams:
            gram, count = grams.most_common(1)[0]
            if (sum(map(len, gram)) + n - 1) * count > scale * limit * len(text):
                broken.add(f"repeated {n}-grams")
    for n, limit in repetition.REPEATED.items():
        seen, characters, i = set(), 0, 0
        while i < len(words) - n + 1:
            gram = tuple(words[i : i + n])
            if gram in seen:
                characters, i = characters + sum(map(len, gram)), i + n
            else:
                seen.add(gram)
                i += 1
        if characters > scale * limit * len(text):
            broken.add(f"repeated {n}-grams")
    return broken


def test_repetition_decides_as_the_rules_are_written():
    """Screens and shortcuts change no decision: 400 texts from harmless to hopeless, against the plain loops."""
    rng, texts = random.Random(0), []
    for i in range(400):
        vocabulary = [f"word{j}" for j in range(rng.choice([3, 10, 40, 300, 5000]))]
        sentences = [" ".join(rng.choices(vocabulary, k=rng.randint(4, 20))) for _ in range(rng.randint(1, 30))]
        texts.append(". ".join(rng.choices(sentences, k=len(sentences)) if i % 2 else sentences))
    reasons = repetition.filter([Document(str(i), text) for i, text in enumerate(texts)], repetition.Config())
    removed = 0
    for text, reason in zip(texts, reasons, strict=True):
        expected = naive_repetition(text)
        if not reason.startswith(("repeated lines", "repeated paragraphs")):
            assert bool(reason) == bool(expected) and (not reason or reason.partition(":")[0] in expected), text
        removed += bool(reason)
    assert 100 < removed < 350


@pytest.mark.parametrize("code", [*RIGHTS, "th"])
def test_no_language_dies_of_english_rules(code):
    """The Declaration of Human Rights in every language, several times longer by other words of its own."""
    text = RIGHTS.get(code, THAI)
    ends = {"zh": "。", "ja": "。", "hi": "।", "th": " "}
    pieces = [text[i:] for i in range(0, 24, 4)]
    page = "\n".join(piece.rstrip(" .") + ends.get(code, ".") for piece in pieces) if code != "th" else THAI
    document = Document("d", page, language=code)
    assert gopher.filter([document], gopher.Config(min_words=10)) == [""]
    assert c4.clean(document, c4.Config(min_sentences=1)) == ""
    assert fineweb.filter([document], fineweb.Config()) == [""]


@pytest.mark.parametrize("text, reason", [
    ("Too short.", "number of words"), ("ab " * 100, "mean word length"), ("# " * 30 + prose(1), "symbols"),
    ("\n".join(f"- item of the list that is number {i}" for i in range(40)), "lines"),
    (" ".join(f"{i} {i}.5" for i in range(100)) + " of the things", "mean word length"),
    ("12345 " * 60 + "the whole of it", "words without letters"),
    (" ".join(f"table{i}x" for i in range(100)), "function words"),
])
def test_gopher(text, reason):
    found = gopher.filter([Document("d", text, language="en"), Document("c", text, "code")], gopher.Config())
    assert found[0].startswith(reason) and found[1] == ""


def test_c4_and_fineweb():
    body = "\n".join(f"This is sentence {i} of the page." for i in range(6))
    page = f"Home | Shop\n{body}\nWe use cookies to improve it, see our policy.\nPlease enable Javascript.\nSo [12] it ends[citation needed].\nno end"
    assert cleaned(c4, page) == ("", f"{body}\nSo  it ends.")
    assert cleaned(c4, body + "\nfunction() { return 1")[0] == ""  # a line that ends no sentence is not looked at
    assert cleaned(c4, body + "\nHe wrote { in it.")[0] == "curly bracket"
    assert cleaned(c4, body + "\nLorem ipsum dolor sit amet.")[0] == "placeholder text"
    assert cleaned(c4, "One sentence only here.")[0] == "too few sentences: 1"
    rules = {"a line\n" * 3 + body.replace(".", ""): "lines without an end", "Yes.\nNo.\n" + body[:60]: "short lines",
             (body + "\n") * 2: "repeated lines", "": "empty"}
    for text, reason in rules.items():
        assert fineweb.filter([Document("d", text)], fineweb.Config())[0].startswith(reason)
    assert fineweb.filter([Document("d", "\n".join(f"Only three words{i}, which make it a longer line." for i in range(9)))], fineweb.Config()) == [""]


def test_lines_that_many_share_go():
    documents = [Document(str(i), f"Home  > Products {i} > About us\n{prose(i)}Copyright {2000 + i}, all of it.\nok") for i in range(12)]
    documents += [Document("code", "Home  > Products 1 > About us\n", "code"), Document("menu", "home products about us")]
    assert select("lines", documents, lines.Config(min_documents=5)) == [""] * 13 + ["nothing but shared lines"]
    assert documents[3].text == prose(3) + "ok" and documents[12].text.startswith("Home")
    with pytest.raises(ConfigError, match="min_documents: 1 would remove every line"):
        lines.check(lines.Config(min_documents=1))


@pytest.mark.parametrize("text, masked", [
    ("write to Jane.Doe+x@mail.example.org.", "write to <EMAIL>."), ("from 8.8.4.4 to 10.0.0.1 in version 1.2.3.4567", "from <IP> to 10.0.0.1 in version 1.2.3.4567"),
    ("card 4111 1111 1111 1111, order 4111 1111 1111 1112", "card <CARD>, order 4111 1111 1111 1112"),
    ("IBAN DE89 3704 0044 0532 0130 00 or DE89 3704 0044 0532 0130 01", "IBAN <IBAN> or DE89 3704 0044 0532 0130 01"),
    ("call +49 30 1234 5678 or (415) 555-0132, 415-555-0132 on 2024-01-02", "call <PHONE> or <PHONE>, <PHONE> on 2024-01-02"),
    ("key AKIAIOSFODNN7EXAMPLE in use", "key <KEY> in use"), ("pi is 3.14159265358979 and 1000000", "pi is 3.14159265358979 and 1000000"),
])
def test_personal_data_is_masked(text, masked):
    assert cleaned(pii, text) == ("", masked)
    if "CARD" in masked:
        assert cleaned(pii, text, domain="code")[1] == text


@pytest.mark.parametrize("ending, text, left", [
    ("py", "# Copyright 2020 A\n# Licensed under the X.\n\nx = 1\n", "x = 1\n"),
    ("py", "#!/bin/sh\n# Copyright A\n# SPDX-License-Identifier: MIT\nx = 1\n", "#!/bin/sh\n# SPDX-License-Identifier: MIT\nx = 1\n"),
    ("py", "# what f does\nx = 1\n", None), ("py", '"""Copyright 2020 A.\n\nLicensed.\n"""\nx = 1\n', None),
    ("c", "/*\n * Copyright (c) A. All rights reserved.\n */\nint x;\n", "int x;\n"),
    ("c", "/* Copyright A\n * SPDX-License-Identifier: GPL-2.0 OR MIT */\nint x;\n", "/* SPDX-License-Identifier: GPL-2.0 OR MIT */\nint x;\n"),
    ("c", "#include <licence.h>\n#define LICENSE 1\nint x;\n", None), ("c", "// license text\nint x;\n", "int x;\n"),
    ("vim", '" license\nset x\n', None), ("lua", "-- Copyright A\nx = 1\n", "x = 1\n"), ("go", "# Copyright A\n", None),
    ("jsonl#7", "#include <licence.h>\nint x;\n", None), ("jsonl#7", "# Copyright A\nx = 1\n", "x = 1\n"),
    ("html", "<!-- SPDX-License-Identifier: MIT -->\n<p>\n", "<!-- SPDX-License-Identifier: MIT -->\n<p>\n"),
])  # fmt: skip
def test_licence_headers(ending, text, left):
    document = Document(f"s/a.{ending}", text, "code")
    assert licence.clean(document, licence.Config()) == "" and document.text == (text if left is None else left)


def test_a_licence_that_forbids_use_removes_the_file():
    assert cleaned(licence, "# Copyright A. Proprietary and confidential.\nx = 1\n", domain="code")[0].startswith("licence: proprietary")


def test_masking_takes_time_as_the_text_is_long():
    begin = "-----BEGIN RSA PRIVATE KEY-----"
    for text in ("%20" * 70_000 + "@", "a" * 200_000 + "@", "a@" + "b." * 100_000, begin * 7_000, "sk-" * 70_000, "+1 " * 70_000, "1 " * 100_000 + "@"):
        started = time.process_time()
        cleaned(pii, text)
        assert time.process_time() - started < 1, text[:40]
    assert cleaned(pii, f"{begin}\nProc-Type: 4,ENCRYPTED\n{'A' * 3000}\n-----END RSA PRIVATE KEY-----.") == ("", "<KEY>.")


def test_pages_found_under_many_addresses_leave_one():
    import yaml

    order = yaml.safe_load((Path(__file__).parents[2] / "conf/data/web.yaml").read_text())["blocks"]
    documents = [Document(str(i), "\n".join(prose(j) for j in range(5)), url=f"http://a/{i}") for i in range(12)] + [Document("x", prose(50))]
    left = documents
    for name in [name for name in order if name in ("url", "exact", "minhash", "lines")]:
        left = [document for document, reason in zip(left, select(name, left), strict=True) if not reason]
    assert [document.id for document in left] == ["0", "x"] and left[0].text.count("\n") == 9
    for first, then in (("exact", "lines"), ("minhash", "lines"), ("split", "decontaminate"), ("classifier", "split")):
        with pytest.raises(ConfigError, match=f"'{then}' stands before '{first}'"):
            curate.check(parse(curate.Config, {"blocks": [then, first, *(["split"] if "split" not in (then, first) else [])]}, "data"), {})


def test_code_is_run_and_its_output_shown():
    source = ('"""Sums."""\nimport math\n\ndef double(n: int) -> int:\n    return 2 * n\n\ndef shout(text):\n    return text.upper()\n\n'
              "def unknown(thing):\n    return thing\n\ndef fails(n):\n    return n / 0\n")
    document, needs = Document("s/tool.py", source, "code"), Document("s/b.py", "import numpy\n" + source, "code")
    other, deep = Document("s/c.js", source, "code"), Document("s/d.py", f"def f(n: {'+'.join('1' * 400)}):\n    return n\n", "code")
    assert select("execute", [document, needs, other, deep]) == [""] * 4
    assert document.text.startswith(source.rstrip()) and other.text == source and needs.text == "import numpy\n" + source
    shown = [line[2:] for line in document.text[len(source):].splitlines() if line.startswith("# ")]
    calls = [(call[4:], value) for call, value in zip(shown[::2], shown[1::2], strict=True)]
    scope: dict = {}
    exec(source, scope)
    assert len(calls) >= 4 and all(repr(eval(call, scope)) == value for call, value in calls)
    assert not any("fails" in call or "unknown" in call for call, _ in calls)
    late = Document("s/late.py", "def words(text: str) -> list:\n    while len(text) > 8: pass\n    return set(text.split())\n", "code")
    execute.filter([late], execute.Config(calls=8))
    assert ">>>" not in late.text  # how many calls came before the limit is chance
    again = Document("s/tool.py", source, "code")
    execute.filter([again], execute.Config())
    assert again.text == document.text


def test_what_is_shown_of_a_set_is_the_same_in_every_process():
    script = ("from stages import sandbox\nprint(sandbox.run([sandbox.Program('def f(text): return set(text.split())', "
              "['f(\"river stone tea letter garden window\")'])])[0].values)")
    run = [subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
           for _ in range(2)]
    assert run[0] == run[1] and "river" in run[0]


def test_the_classifier_finds_what_is_like_the_good_ones(tmp_path, monkeypatch):
    rng = random.Random(0)
    science, chat = "theorem proof energy molecule equation experiment theory".split(), "lol omg cool selfie party shopping vibes".split()

    def text(words):
        return " ".join(rng.choice([*words, *"the a of and it to in is was that for on".split()]) for _ in range(80))

    (tmp_path / "good.jsonl").write_text("".join(json.dumps({"text": text(science)}) + "\n" for _ in range(60)))
    documents = [Document(str(i), text(science if i % 4 == 0 else chat)) for i in range(400)]
    config = classifier.Config(good=[str(tmp_path / "good.jsonl")], sample=0.2, min_score=0.2, upsample=[[0.5, 3]])
    reasons = select("classifier", documents, config)
    right = [(not reason) == (i % 4 == 0) for i, reason in enumerate(reasons)]
    assert sum(right) >= 392
    assert sum(document.repeat == 3 for document in documents[::4]) > 70
    assert all(document.repeat == 1 for i, document in enumerate(documents) if i % 4)
    assert classifier.external(config)[0]["files"] == 1
    monkeypatch.setattr(classifier, "LARGEST", 30)
    alike = select("classifier", documents, classifier.Config(good=config.good, sample=1.0, min_score=0.2))
    assert sum((not reason) == (i % 4 == 0) for i, reason in enumerate(alike)) >= 380
    with pytest.raises(ConfigError, match="good: is empty"):
        curate.check(parse(curate.Config, {"blocks": ["classifier", "split"]}, "data"), {})
    with pytest.raises(ConfigError, match="good: 0 documents against [0-9]+ others are too few"):
        select("classifier", documents, classifier.Config(sample=0.2))
    for upsample in ([[3, 2]], [0.9, 3]):
        with pytest.raises(ConfigError, match="upsample"):
            classifier.check(classifier.Config(upsample=upsample))
    left = [document for document, reason in zip(documents, select("classifier", documents, replace(config, min_score=0.0, grades=[0.2, 0.5])), strict=True) if not reason]
    assert {document.quality for document in left} >= {"0", "2"} and sum(document.quality == "2" for document in documents[::4]) > 70
    for document in left:
        document.repeat, document.split = 1, "train"
    reasons = select("mix", left, mix.Config(by="quality", weights={"2": 1}, max_epochs=1.0))
    assert {document.quality for document, reason in zip(left, reasons, strict=True) if not reason} == {"2"}


def mixed(documents, **values):
    reasons = select("mix", documents, mix.Config(**values))
    found = Counter()
    for document, reason in zip(documents, reasons, strict=True):
        found[document.source] += 0 if reason else document.repeat * len(document.text)
    return found


def test_mixtures():
    def made():
        return [Document(f"{source}{i}", f"{i:05d}{source}".ljust(100, "x"), source=source, split="train")
                for source, count in (("web", 4000), ("books", 500)) for i in range(count)]

    found = mixed(made(), weights={"web": 1, "books": 1})  # books limit it: four epochs
    assert found["books"] == 4 * 50_000 and abs(found["web"] - 200_000) < 15_000
    found = mixed(made(), weights={"web": 3, "books": 1}, bytes=100_000)
    assert abs(found["web"] - 75_000) < 9_000 and abs(found["books"] - 25_000) < 5_000
    found = mixed(made(), temperature=2.0, max_epochs=10)  # sqrt(8) : 1
    assert abs(found["web"] / found["books"] - 8**0.5) < 0.2
    assert mixed(made(), weights={"books": 1})["web"] == 0
    with pytest.raises(ConfigError, match="name no source"):
        mixed(made(), weights={"wikipedia": 1, "web": 1})
    with pytest.raises(ConfigError, match="need more than max_epochs=4"):
        mixed(made(), weights={"books": 1}, bytes=10**6)
    with pytest.raises(ConfigError, match="weights"):
        mix.check(mix.Config(weights={"web": -1}))


def test_long_documents_balanced_by_domain():
    documents = [Document(f"{domain}{i}", f"{i:03d}".ljust(size, domain[0]), domain, source="s", split="train")
                 for domain, size, count in (("code", 5000, 40), ("prose", 5000, 200), ("prose", 500, 4000)) for i in range(count)]  # fmt: skip
    reasons = select("mix", documents, mix.Config(by="domain", temperature=1e6, min_characters=1000, max_epochs=1))
    kept = Counter(document.domain for document, reason in zip(documents, reasons, strict=True) if not reason)
    assert kept["code"] == 40 and 30 <= kept["prose"] <= 50
    assert reasons[-1] == "mix: shorter than 1000 characters"


def test_a_mixture_of_copies_of_little_and_of_nothing():
    documents = [Document(str(i), f"{i:03d}".ljust(100, "x"), source="ab"[i % 2], split="train", repeat=3 if i < 40 else 1) for i in range(400)]
    assert mixed(documents, weights={"a": 1, "b": 5}) and max(document.repeat for document in documents) == 4
    even = [Document(str(i), f"{i:03d}".ljust(100, "x"), source="ab"[i > 300], split="train") for i in range(400)]
    assert set(mixed(even, temperature=0.001)) == {"a", "b"} and mix.epochs({1: 10**6, 2: 10}, {1: 1, 2: 1}, {}, mix.Config(temperature=1e-3))[1] == 1
    assert mix.epochs({}, {}, {1: 1.0}, mix.Config()) == {}


def test_an_existing_corpus_is_not_taken_again(tmp_path):
    docs, more = tmp_path / "docs", tmp_path / "more"
    docs.mkdir()
    more.mkdir()
    for i in range(20):
        (docs / f"{i}.txt").write_text(prose(i))
        (more / f"{i}.txt").write_text(prose(i + 15) + ("" if i % 2 else " And a little more.\n"))

    def run(name, **values):
        out = tmp_path / name
        out.mkdir()
        config = parse(curate.Config, {"options": {"split": {"heldout": 0.1}, "minhash": {"bands": 14, "rows": 8}}, **values}, "data")
        curate.run(config, {}, out, Context(tmp_path))
        return {split: {row["id"]: row for row in corpus.documents(out, split)} for split in ("train", "heldout", "removed")}, curate.external(config)

    first, _ = run("first", sources=[str(docs)])
    held = {int(name.split("/")[1][:-4]) for name in first["heldout"]}
    second, identity = run("second", sources=[str(more)], existing=[str(tmp_path / "first")])
    gone = {name for name, row in second["removed"].items() if row["reason"].partition(": ")[2].startswith("first/")}
    assert gone == {f"more/{i}.txt" for i in range(5) if i + 15 not in held}
    assert all(name.startswith("more/") for split in second.values() for name in split)
    assert identity["existing"][0]["label"] == "first"
    with pytest.raises(ConfigError, match="holds no train-"):
        run("third", sources=[str(more)], existing=[str(docs)])


@pytest.mark.parametrize("field", ["benchmarks", "existing"])
def test_a_benchmark_that_cannot_be_read_is_an_error(tmp_path, field):
    import pyarrow.parquet

    for name in ("docs", "bench", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "docs" / "a.txt").write_text(prose(1))
    pyarrow.parquet.write_table(pyarrow.table({"query": ["of no known name"]}), tmp_path / "bench" / "train-00000.parquet")
    config = parse(curate.Config, {"sources": [str(tmp_path / "docs")], field: [str(tmp_path / "bench")]}, "data")
    with pytest.raises(CuveeError, match=f"data.{field}: bench/train-00000.parquet#1 .*text, content, prompt, question, messages"):
        curate.run(config, {}, tmp_path / "out", Context(tmp_path))
    assert not list((tmp_path / "out").iterdir())


KOREAN = (RIGHTS["ko"] + ". 서로 형제애의 정신으로 행동하여야 한다. 모든 사람은 생명과 신체의 자유와 안전에 대한 권리를 가진다. 그는 이 책의 내용을 읽고 "
          "생각을 정리하여 글을 썼다. 오늘은 날씨가 좋아서 공원에 가서 산책을 하고 커피를 마셨다. Seoul 2024: 기술의 발전은 사회에 큰 영향을 준다.\n") * 3


def as_thai(text: str) -> str:
    """How the damage came about: each byte read as cp874, else as cp1252, else dropped."""
    found = ""
    for byte in text.encode():
        for page in ("cp874", "cp1252"):
            try:
                found += bytes([byte]).decode(page)
                break
            except UnicodeDecodeError:
                continue
    return found


def test_korean_that_was_read_as_thai():
    damaged = as_thai(KOREAN)
    assert damaged.startswith("๋ชจ๋") and len(damaged) < len(KOREAN.encode()) - len(KOREAN) // 10
    reason, mended = cleaned(encoding, damaged)
    assert reason == "" and len(mended) == len(KOREAN)
    assert sum(a == b for a, b in zip(mended, KOREAN, strict=True)) >= 0.95 * len(KOREAN)
    for text in (THAI, KOREAN, RIGHTS["fr"], "๊๋์ํ " * 20):
        assert cleaned(encoding, text)[1] == text


def test_near_duplicates_of_a_benchmark_go(tmp_path):
    for name, seeds in (("docs", range(10)), ("bench", [3, 50])):
        (tmp_path / name).mkdir()
        for i in seeds:
            (tmp_path / name / f"{i}.txt").write_text(prose(i, 400) + f" Page {name}.\n" * (name == "docs"))
    out = tmp_path / "out"
    out.mkdir()
    config = parse(curate.Config, {"sources": [str(tmp_path / "docs")], "benchmarks": [str(tmp_path / "bench")], "blocks": ["minhash", "split"],
                                   "options": {"split": {"heldout": 0}}}, "data")  # fmt: skip
    curate.run(config, {}, out, Context(tmp_path))
    assert [(row["id"], row["reason"]) for row in corpus.documents(out, "removed")] == [("docs/3.txt", "near-duplicate: bench/3.txt")]
    assert len(list(corpus.documents(out, "train"))) == 9
