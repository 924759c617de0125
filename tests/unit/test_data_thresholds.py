"""What thresholds do: the report's counts against a rerun at every value, its documents, its sample, what it hides."""

from __future__ import annotations

import json
import random
from dataclasses import fields, replace

import pytest

from stages.data import curate, thresholds
from stages.data.blocks import gopher
from stages.data.document import Document
from stages.data.engine import select
from stages.data.thresholds import Seen
from stages.stage import Context, names, parse, resolve

from test_data_blocks import RIGHTS, THAI  # isort: skip
from test_data_curate import code, prose  # isort: skip

FILTERS = [name for name in names("data/blocks") if not hasattr(resolve("data/blocks", name), "join")
           and thresholds.thresholds(getattr(resolve("data/blocks", name), "Config", type(None))())]  # fmt: skip


UNWANTED = [THAI, "Alla människor är födda fria och lika i värde och rättigheter. De är utrustade med förnuft och samvete.",
            "Minden emberi lény szabadon születik és egyenlő méltósága és joga van.", "Kaikki ihmiset syntyvät vapaina ja tasavertaisina.",
            "Всички хора се раждат свободни и равни по достойнство и права.", "Svi ljudi rađaju se slobodni i jednaki u dostojanstvu."]  # fmt: skip


def varied() -> list[Document]:
    """Documents of all kinds, many of them close to some rule's limit."""
    rng, found = random.Random(0), []
    for i in range(100):
        sentences = [" ".join(prose(rng.randrange(999)).split()[: rng.randint(3, 14)]) + rng.choice([".", ".", "", "...", "?"]) for _ in range(rng.randint(2, 14))]
        lines = [rng.choice(["", "", "- ", "# "]) + one for one in sentences + sentences[: rng.randint(0, 4)]]
        words = [str(rng.randrange(99)) for _ in range(rng.randint(0, 30))] + ["\ufffd"] * rng.choice([0, 0, 0, 1, 2, 8])
        found.append(Document(f"d/{i}", rng.choice(["\n", "\n\n", " "]).join(lines) + "\n" + " ".join(words), language="en"))
    for i in range(25):
        found.append(Document(f"c/{i}.py", code(i)[: rng.randint(50, 400)] + "x" * rng.choice([0, 700, 1200]), "code"))
        found.append(Document(f"n/{i}", "name " * rng.randint(1, 4), "names"))
    for i in range(80):
        found.append(Document(f"l/{i}", rng.choice([*RIGHTS.values(), *UNWANTED])[: rng.randint(12, 60)]))
    return found


def test_the_options_that_are_thresholds():
    assert {"encoding", "language", "gopher", "c4", "fineweb", "repetition", "quality"} <= set(FILTERS)
    for name in names("data/blocks"):
        for field in fields(getattr(resolve("data/blocks", name), "Config", gopher.Config)):
            if stricter := field.metadata.get("stricter"):
                assert field.name[:4] not in ("min_", "max_") or field.name.startswith("min_" if stricter > 0 else "max_"), (name, field.name)
    found = thresholds.thresholds(gopher.Config(min_words=0))
    assert "min_words" not in found and found["max_words"] == ([110_000, 125_000], [90_000, 75_000])
    assert found["min_stop_words"] == ([1, 0], [3, 4]) and found["max_bullets"] == ([0.91, 0.925], [0.89, 0.875])
    assert found["min_mean_length"] == ([2.7, 2.25], [3.3, 3.75]) and found["max_symbols"] == ([0.11, 0.125], [0.09, 0.075])


@pytest.mark.parametrize("name", FILTERS)
def test_the_counts_are_those_of_a_rerun(name):
    options, documents = resolve("data/blocks", name).Config(), varied()

    def judge(some, places, changed):
        return select(name, some, changed)

    def removed(**changed):
        return {one.id for one, reason in zip(documents, select(name, list(map(replace, documents)), replace(options, **changed)), strict=True) if reason}

    sample = [Seen(one, i, reason) for i, (one, reason) in enumerate(zip(documents, select(name, list(map(replace, documents)), options), strict=True))]
    rows, base, turns = thresholds.merge(thresholds.look(name, options, judge, sample)), removed(), 0
    assert [row["option"] for row in rows] == list(thresholds.thresholds(options))
    for row in rows:
        assert len(row["removed"]) == 5 and row["documents"] == len(documents)
        for value, count in row["removed"]:
            there = removed(**{row["option"]: value})
            assert count == len(there), (row["option"], value)
            turns += len(there ^ base)
            assert {one["id"] for one in row["nearest"] if one["value"] == value} <= there ^ base
    assert 0 < len(base) < len(documents) and turns > 0


def test_shards_are_added_up_and_the_nearest_stand_first():
    def judge(some, places, options):
        return ["short" if int(one.text) < options.min_words else "" for one in some]

    parts = []
    for shard in range(4):
        documents = [Document(f"{shard}/{i}", str(i)) for i in range(shard, 100, 4)]
        sample = [Seen(one, i, reason) for i, (one, reason) in enumerate(zip(documents, judge(documents, None, gopher.Config()), strict=True))]
        parts += json.loads(json.dumps(thresholds.look("b", gopher.Config(), judge, sample)))
    (row,) = [row for row in thresholds.merge(parts) if row["option"] == "min_words"]
    assert row["documents"] == 100 and row["removed"] == [[38, 38], [45, 45], [50, 50], [55, 55], [62, 62]]
    below, above = ([one for one in row["nearest"] if (one["value"] < 50) == side] for side in (True, False))
    assert len(below) == len(above) == thresholds.SHOWN
    assert all(one["value"] == 45 and 45 <= int(one["text"]) < 50 for one in below) and all(50 <= int(one["text"]) < 55 for one in above)


def test_the_sample_is_a_share():
    assert thresholds.share(1000) == thresholds.share(0) == 1 and thresholds.share(thresholds.LEAST * 4) == 0.25 and thresholds.share(10**12) == 0.01
    documents = [Document(str(i), "") for i in range(20_000)]
    chosen = [one.id for one in documents if thresholds.drawn(one, 0.05)]
    assert 850 < len(chosen) < 1150 and set(chosen) > {one.id for one in documents if thresholds.drawn(one, 0.02)}


def test_a_corpus_says_what_its_blocks_did(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    for i in range(60):
        (docs / f"{i}.txt").write_text(prose(i, 20 + i) + f"Write to anna{i}@example.org, or come.\n")
    out = tmp_path / "out"
    out.mkdir()
    values = {"sources": [str(docs)], "blocks": ["encoding", "gopher", "pii", "exact", "split"]}
    metrics = curate.run(parse(curate.Config, values, "data"), {}, out, Context(tmp_path))
    table = json.loads((out / "table.json").read_text())
    blocks = {one["block"]: one for one in table["blocks"]}
    assert blocks["pii"]["changed"] == blocks["gopher"]["kept"] == metrics["changed/pii"] and blocks["encoding"]["changed"] == 0
    assert metrics["removed/gopher"] == 60 - metrics["kept/gopher"] > 5 and metrics["bytes/split"] == blocks["split"]["bytes"]
    for one in table["changed_examples"]["pii"]:
        assert one["before"] == "" and "<EMAIL>" in one["after"]  # what was masked is not shown
    words = next(row for row in table["thresholds"] if row["option"] == "min_words")
    assert words["block"] == "gopher" and dict(map(tuple, words["removed"]))[50] == metrics["removed/gopher"] and words["nearest"]
    samples = json.loads((out / "samples.json").read_text())
    assert list(samples) == ["block", "why", "id", "text"] and len({len(column) for column in samples.values()}) == 1
    assert {"gopher", "pii"} == set(samples["block"]) and any("min_words 50; of 60 documents go" in why for why in samples["why"])
    assert not any("@example.org" in text for block, text in zip(samples["block"], samples["text"], strict=True) if block == "pii")
