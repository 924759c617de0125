"""The engine: the same bytes with any number of workers, after kills, and through either executor; joins on disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import traceback
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from stages.data import corpus, curate, engine, join, source, thresholds
from stages.data.document import Document
from stages.stage import Context, CuveeError, names, parse

WORDS = ("river mountain harbour window table letter garden winter summer evening morning question answer story music "
         "bridge village market teacher student doctor kitchen journey island forest paper silver copper stone").split()


def prose(seed: int, words: int = 120) -> str:
    rng = random.Random(seed)
    return " ".join(f"the {rng.choice(WORDS)} of {rng.choice(WORDS)} and {rng.choice(WORDS)} {rng.randrange(999)} is" for _ in
                    range(words // 7)).capitalize() + ".\n"


@pytest.fixture
def docs(tmp_path, monkeypatch):
    """About 1 MB in several files, with duplicates across them, cut into shards of 60 KB."""
    monkeypatch.setattr(source, "SHARD", 60_000)
    monkeypatch.setattr(thresholds, "LEAST", 50_000)
    docs = tmp_path / "docs"
    docs.mkdir()
    for part in range(4):
        texts = [prose(part * 1000 + i if i % 7 else i, 100 + i % 300) for i in range(150)]
        lines = "".join(json.dumps({"text": text + prose(i, 7) * (part == 3)}) + "\n" for i, text in enumerate(texts))
        (docs / f"part{part}.jsonl").write_text(lines + "{broken\n")
    for i in range(20):
        (docs / f"note{i}.txt").write_text(prose(9000 + i))
    return docs


def run(tmp_path, docs, name, **values):
    scratch, out = tmp_path / f"{name}-scratch", tmp_path / f"{name}-out"
    scratch.mkdir(exist_ok=True)
    out.mkdir()
    config = parse(curate.Config, {"sources": [str(docs)], "options": {"split": {"heldout": 0.05}}, **values}, "data")
    curate.external(config)
    metrics = curate.run(config, {}, out, Context(scratch))
    return {path.name: path.read_bytes() for path in out.iterdir()}, metrics


@pytest.fixture
def everything(docs, tmp_path):
    """A configuration of all blocks, and sources in which each of them finds something to do."""
    lake = tmp_path / "lake"
    passage = prose(77, 500)
    rows = [{"text": prose(5000 + i, 140) + (passage if i in (3, 40, 80) else "") + "Menu and footer of a well known site.\n",
             "url": f"http://{'bad' if i % 30 == 7 else 'good'}.org/{i % 95}"} for i in range(100)]  # fmt: skip
    rng = random.Random(1)
    rows += [{"text": "The " + " ".join(rng.choice(f"the of {words}".split()) for _ in range(150)) + f" {i}.", "url": f"http://w.org/{words[:3]}{i}"}
             for words in ("lol omg selfie party vibes", "stab punch weapon blood beat") for i in range(20)]  # fmt: skip
    (lake / "pages").mkdir(parents=True)
    (lake / "crawl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(12):
        (lake / "pages" / f"{i}.html").write_text(f"<html><body><nav>Home</nav><article><p>{prose(6000 + i)}</p></article></body></html>")
        (lake / "tool" / f"p{i}").mkdir(parents=True)
        (lake / "tool" / f"p{i}" / "a.py").write_text("# Copyright A\nimport b\n\ndef twice(n: int) -> int:\n    return 2 * n\n" + f"# note {i}\n" * 20)
        (lake / "tool" / f"p{i}" / "b.py").write_text("".join(f"def f{i}_{j}(value):\n    return value + {j}\n" for j in range(9)))
    for name, text in {"good": prose, "blood": lambda i: " ".join(rng.choice("the of stab punch weapon blood beat".split()) for _ in range(90))}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text(8000 + i)}) + "\n" for i in range(60)))
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "suite.jsonl").write_text(json.dumps({"text": " ".join(prose(5011, 140).split()[20:70])}))
    (tmp_path / "list.txt").write_text("0.0.0.0 bad.org\n")
    options = {"domains": {"lists": [str(tmp_path / "list.txt")]}, "c4": {"min_sentences": 1}, "lines": {"min_documents": 50}, "split": {"heldout": 0.05},
               "classifier": {"good": [str(tmp_path / "good.jsonl")], "sample": 0.5, "min_score": 0.05},
               "safety": {"seeds": {"violence": [str(tmp_path / "blood.jsonl")]}, "sample": 0.5, "max_score": 0.3},
               "mix": {"weights": {"docs": 1, "lake": 2}, "max_epochs": 2.0}, "imports": {"depth": 2}}  # fmt: skip
    blocks = ["domains", "url", "encoding", "html", "language", "licence", "gopher", "repetition", "c4", "fineweb", "quality", "pii", "exact",
              "minhash", "lines", "substring", "execute", "imports", "safety", "classifier", "split", "decontaminate", "mix"]  # fmt: skip
    return {"sources": [str(docs), str(lake)], "benchmarks": [str(tmp_path / "bench")], "blocks": blocks, "options": options}


def test_bytes_of_every_block_do_not_depend_on_the_workers(everything, docs, tmp_path):
    assert set(everything["blocks"]) == set(names("data/blocks"))
    curate.check(parse(curate.Config, everything, "data"), {})
    expected, _ = run(tmp_path, docs, "one", **everything, workers=1)
    table = json.loads(expected["table.json"])
    did = {one["block"]: one["removed"] + one["changed"] for one in table["blocks"]}
    assert [name for name in names("data/blocks") if engine.joins(name) and not did[name]] == ["split"]
    assert sum(name.startswith("train-") for name in expected) >= 8 and len(table["thresholds"]) > 20
    for elsewhere in ({"workers": 2}, {"workers": 8}, *[{"workers": 2, "executor": "ray"}] * bool(find_spec("ray"))):
        assert run(tmp_path, docs, str(elsewhere), **everything, **elsewhere)[0] == expected, elsewhere


def test_joins_that_do_not_fit_are_brought_in_order_by_the_workers(docs, tmp_path, monkeypatch):
    values = {"blocks": ["exact", "minhash", "lines", "substring", "split", "decontaminate"], "options": {"lines": {"min_documents": 3}}}
    expected, _ = run(tmp_path, docs, "fits", **values)
    monkeypatch.setattr(join, "ROWS", 700)
    sorts, sort = [], join.Shuffle.sort
    monkeypatch.setattr(join.Shuffle, "sort", lambda self, part: sorts.append(self.name) or sort(self, part))
    assert run(tmp_path, docs, "here", workers=1, **values)[0] == expected and {"minhash", "substring"} <= set(sorts)
    assert run(tmp_path, docs, "workers", workers=3, **values)[0] == expected


def test_a_join_that_is_killed_reads_its_parts_again(docs, tmp_path, monkeypatch):
    expected, _ = run(tmp_path, docs, "fits", workers=1)
    monkeypatch.setattr(join, "ROWS", 700)
    minhash, joined = engine.block("minhash"), engine.block("minhash").join

    def killed(keys, config, state):
        next(join.in_order(keys, state.folder))
        raise KeyboardInterrupt

    monkeypatch.setattr(minhash, "join", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, docs, "killed", workers=1)
    monkeypatch.setattr(minhash, "join", joined)
    (tmp_path / "killed-out").rmdir()
    assert run(tmp_path, docs, "killed", workers=1)[0] == expected
    assert not list((tmp_path / "killed-scratch").rglob("sorted-*")) and not list((tmp_path / "killed-scratch").rglob("rows-*"))


def test_nothing_is_lost_and_nothing_twice(docs, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "BATCH_BYTES", 20_000)
    files, metrics = run(tmp_path, docs, "one", workers=2)
    assert sum(name.startswith("train-") for name in files) >= 8  # shards
    assert metrics["documents_removed"] > 50 and metrics["documents_heldout"] > 5
    ids = [document["id"] for split in ("train", "heldout", "removed") for document in corpus.documents(tmp_path / "one-out", split)]
    assert len(ids) == len(set(ids)) == 4 * 151 + 20  # also where a file is cut


def test_what_a_task_of_ray_refuses_is_one_sentence(docs, tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(CuveeError, match="^data.benchmarks: part1.jsonl/part1.jsonl#byte.* cannot be compared with") as error:
        run(tmp_path, docs, "ray", executor="ray", workers=2, sources=[str(docs / "part0.jsonl")], benchmarks=[str(docs / "part1.jsonl")])
    assert "\n" not in str(error.value)


def test_no_number_of_workers_is_all_of_a_cluster(tmp_path):
    for name, expected in (("ray", 0), ("local", Context(tmp_path).threads)):
        assert engine.executor(curate.Config(["x"], executor=name), Context(tmp_path))[1] == expected
        assert engine.executor(curate.Config(["x"], executor=name, workers=3), Context(tmp_path))[1] == 3


def test_labels_never_meet(tmp_path):
    for name in ("a-2", "x/a", "y/a", "z/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "t.txt").write_text("x")
    found = source.find([str(tmp_path / name) for name in ("a-2", "x/a", "y/a", "z/a")], 0, 0, 0)
    assert [one.label for one in found] == ["a-2", "a", "a-3", "a-4"]


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_it_goes_on(docs, tmp_path, monkeypatch, seed):
    """Killed with all its workers at random moments, in shards, between them and in joins of many parts; then let through."""
    expected, _ = run(tmp_path, docs, "whole", workers=1)
    monkeypatch.setattr(join, "ROWS", 700)
    rng, marks, kills = random.Random(seed), tmp_path / "killed-scratch" / "curate", 0
    for attempt in range(5):
        child = os.fork()
        if not child:
            os.setpgid(0, 0)
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                shutil.rmtree(tmp_path / "killed-out", ignore_errors=True)
                run(tmp_path, docs, "killed", workers=rng.randint(1, 3))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        with suppress(OSError):  # whoever of the two is first: a child that is not a group yet would live on
            os.setpgid(child, child)
        wanted = len(list(marks.glob("*.json"))) + (rng.randint(0, 6) if attempt < 4 else 1000)
        while len(list(marks.glob("*.json"))) < wanted and not os.waitpid(child, os.WNOHANG)[0]:
            time.sleep(0.001)
        else:
            try:
                time.sleep(rng.uniform(0, 0.03))
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
            except (ProcessLookupError, ChildProcessError):
                pass  # it was through
    assert kills >= 3 and {path.name: path.read_bytes() for path in (tmp_path / "killed-out").iterdir()} == expected


def test_finished_shards_are_not_done_again(docs, tmp_path, monkeypatch):
    expected, _ = run(tmp_path, docs, "a", workers=1)
    done, run_shard = [], engine.run_shard
    monkeypatch.setattr(engine, "run_shard", lambda plan, number, shard: done.append((number, shard)) or run_shard(plan, number, shard))
    (tmp_path / "a-out").rename(tmp_path / "before")
    scratch = tmp_path / "a-scratch" / "curate"
    (scratch / "2-00002.json").unlink()
    assert run(tmp_path, docs, "a", workers=1)[0] == expected and done == [(2, 2)]


def test_passes():
    steps = engine.passes(["html", "exact", "minhash", "split", "decontaminate"])
    assert [(s.apply, s.run, s.keys) for s in steps] == [
        ([], ["html"], ["exact", "minhash", "split"]), (["exact", "minhash", "split"], [], ["decontaminate"]), (["decontaminate"], [], [])]
    steps = engine.passes(["exact", "html", "split", "quality"])
    assert [(s.apply, s.run, s.keys) for s in steps] == [([], [], ["exact"]), (["exact"], ["html"], ["split"]), (["split"], ["quality"], [])]


@pytest.mark.parametrize("rows", [join.ROWS, 97])
def test_equal_and_components_against_a_plain_loop(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(join, "ROWS", rows)
    rng = np.random.default_rng(0)
    dtype = [("document", np.int64), ("hash", np.uint64)]
    paths, counts = [], [300, 0, 200]
    hashes = rng.integers(0, 2**63, 400, dtype=np.uint64)
    table = []
    for shard, count in enumerate(counts):
        part = np.empty(count * 3, dtype)
        part["document"], part["hash"] = np.repeat(np.arange(count), 3), rng.choice(hashes, count * 3)
        paths.append(tmp_path / f"0-{shard}")
        Path(f"{paths[-1]}.b.keys").write_bytes(part.tobytes())
        Path(f"{paths[-1]}.b.dtype").write_text(json.dumps(part.dtype.descr))
        table += [(row["document"] + sum(counts[:shard]), row["hash"]) for row in part]
    keys = join.Keys(paths, counts, [False] * 3).of("b")
    keys.alive[::9] = False
    first: dict[int, int] = {}
    parent = list(range(500))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for document, hash in sorted(table):
        if document % 9:
            a, b = root(first.setdefault(hash, document)), root(document)
            parent[max(a, b)] = min(a, b)
    found = np.arange(500)
    for later, earliest in join.equal(keys, tmp_path):
        join.connect(found, later, earliest)
    assert len(list(tmp_path.glob("sorted-*"))) == (16 if rows == 97 else 0)
    assert join.roots(found, np.arange(500)).tolist() == [root(i) for i in range(500)]
    assert len(set(found.tolist())) < 400


def test_batches_are_bounded():
    sizes = [len(batch) for batch in engine.batched(Document(str(i), "x" * (engine.BATCH_BYTES // 3)) for i in range(10))]
    assert sizes == [3, 3, 3, 1] or sizes == [4, 4, 2]


@pytest.mark.parametrize("preset", ["web", "zyda2", "code", "long"])
def test_presets_compose(preset):
    from flows.config import compose

    config = compose([f"+data={preset}", "scale=micro"])
    curate.check(parse(curate.Config, config["data"] if isinstance(config, dict) else config.data, "data"), {})
