"""The engine: the same bytes with any number of workers, after kills, and through either executor; joins on disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from stages.data import corpus, curate, engine, join, source
from stages.data.document import Document
from stages.stage import Context, parse

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
    metrics = curate.run(config, {}, out, Context(scratch))
    return {path.name: path.read_bytes() for path in out.iterdir()}, metrics


def test_bytes_do_not_depend_on_the_workers(docs, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "BATCH_BYTES", 20_000)
    one, metrics = run(tmp_path, docs, "one", workers=1)
    assert sum(name.startswith("train-") for name in one) >= 8  # shards
    assert metrics["documents_removed"] > 50 and metrics["documents_heldout"] > 5
    ids = [document["id"] for split in ("train", "heldout", "removed") for document in corpus.documents(tmp_path / "one-out", split)]
    assert len(ids) == len(set(ids)) == 4 * 151 + 20  # nothing lost, nothing twice, where a file is cut neither
    for workers in (2, 8):
        assert run(tmp_path, docs, f"w{workers}", workers=workers)[0] == one


def test_ray_gives_the_same_bytes(docs, tmp_path):
    ray = pytest.importorskip("ray")
    expected, _ = run(tmp_path, docs, "here", workers=1)
    try:
        found, _ = run(tmp_path, docs, "ray", executor="ray", workers=2)
    finally:
        ray.shutdown()
    assert found == expected


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
def test_killed_at_random_it_goes_on(docs, tmp_path, seed):
    """Killed with all its workers at random moments, in shards, between them and in joins; then let through."""
    expected, _ = run(tmp_path, docs, "whole", workers=1)
    rng, marks, kills = random.Random(seed), tmp_path / "killed-scratch" / "curate", 0
    for attempt in range(5):
        child = os.fork()
        if not child:
            os.setsid()
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                shutil.rmtree(tmp_path / "killed-out", ignore_errors=True)
                run(tmp_path, docs, "killed", workers=rng.randint(1, 3))
            finally:
                os._exit(0)
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
