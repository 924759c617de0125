"""Blocks that learn from examples: labels of a judge behind an endpoint, safety seeds."""

from __future__ import annotations

import json
import random

import pyarrow.parquet
import pytest

from stages.data import corpus, curate, judge
from stages.data.blocks import classifier, safety
from stages.data.document import Document
from stages.data.engine import select
from stages.stage import Artifact, ConfigError, Context, CuveeError, Kind, parse

from stub_server import serving  # isort: skip

WORDS = {"science": "theorem proof energy molecule equation experiment theory", "chat": "lol omg cool selfie party shopping vibes",
         "violence": "stab punch kill weapon blood attack beat", "sexual": "naked lust erotic moan nude strip porn",
         "news": "police court stab verdict attack trial judge"}  # fmt: skip


def text(kind: str, seed: int, words: int = 60) -> str:
    rng = random.Random(f"{kind}{seed}")
    return " ".join(rng.choice([*WORDS[kind].split(), *"the a of and it to in is was that for on".split()]) for _ in range(words)) + f" {seed}."


def write(path, kind, count, first=0, **more):
    path.write_text("".join(json.dumps({"text": text(kind, first + i), **more}) + "\n" for i in range(count)))
    return str(path)


@pytest.fixture
def endpoint():
    """An OpenAI-compatible server that gives 5 points to science, 1 to chat, and no JSON to every tenth."""
    asked = []

    def answer(request):
        asked.append(json.loads(request.body)["messages"][0]["content"])
        points = 5 if any(word in asked[-1] for word in WORDS["science"].split()[:3]) else 1
        said = "no idea" if len(asked) % 10 == 0 else f'{{"reasons": "because", "points": {points}}}'
        return 200, {"choices": [{"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}],
                     "usage": {"prompt_tokens": 10, "completion_tokens": 5}}, {}  # fmt: skip

    with serving(answer) as address:
        yield f"{address}/v1", asked


def curated(tmp_path, name, inputs=None, **values):
    out, scratch = tmp_path / name, tmp_path / f"{name}-scratch"
    out.mkdir()
    scratch.mkdir()
    config = parse(curate.Config, {"options": {"split": {"heldout": 0}}, **values}, "data")
    curate.check(config, inputs or {})
    curate.external(config)
    curate.run(config, inputs or {}, out, Context(scratch))
    return Artifact(out, Kind.CORPUS, name, {})


def test_a_judge_labels_and_the_classifier_learns_from_it(tmp_path, endpoint):
    """The whole way: a first corpus, an LLM judge behind an endpoint, a second corpus without what it does not like."""
    url, asked = endpoint
    write(tmp_path / "science.jsonl", "science", 120)
    write(tmp_path / "chat.jsonl", "chat", 280)
    sources = [str(tmp_path / "science.jsonl"), str(tmp_path / "chat.jsonl")]
    first = curated(tmp_path, "first", sources=sources, blocks=["exact", "split"])
    values = {"teacher": {"model": "judge", "url": url, "concurrency": 1}, "documents": 150, "cache": str(tmp_path / "answers")}
    config = parse(judge.Config, values, "judge")
    judge.check(config, {})
    with pytest.raises(CuveeError, match="dry_run: 150 requests .*nothing was sent"):
        judge.run(parse(judge.Config, {**values, "dry_run": True}, "judge"), {"corpus": first}, tmp_path, Context(tmp_path))
    labels = tmp_path / "labels"
    labels.mkdir()
    assert not asked
    metrics = judge.run(config, {"corpus": first}, labels, Context(tmp_path))
    assert len(asked) == 150 and metrics["documents"] == 135 and metrics["unreadable"] == 15
    rows = pyarrow.parquet.read_table(labels / "train-00000.parquet").to_pylist()
    assert {row["score"] for row in rows if "chat" in row["id"]} == {1.0} and {row["score"] for row in rows if "science" in row["id"]} == {5.0}
    assert "grade a text" in asked[0] and judge.external(config)["teacher"]["model"] == "judge"
    again = tmp_path / "again"
    again.mkdir()
    judge.run(config, {"corpus": first}, again, Context(tmp_path))
    assert len(asked) == 150  # every answer is kept
    given = Artifact(labels, Kind.CORPUS, "labels", {})
    second = curated(tmp_path, "second", {"labels": given}, sources=sources, blocks=["classifier", "split"], options={"classifier": {"min_score": 0.5}, "split": {"heldout": 0}})
    kept = [row["id"] for row in corpus.documents(second.path, "train")]
    assert len(kept) >= 115 and sum("science" in name for name in kept) >= len(kept) - 2
    (report,) = json.loads((second.path / "table.json").read_text())["thresholds"]
    assert (report["block"], report["option"], report["threshold"], report["documents"]) == ("classifier", "min_score", 0.5, 400)
    assert [value for value, _ in report["removed"]] == [0.375, 0.45, 0.5, 0.55, 0.625]


def test_labels_that_cannot_be_used(tmp_path):
    documents = [Document(str(i), text("chat", i)) for i in range(20)]
    write(tmp_path / "one.jsonl", "science", 5, score=5)
    with pytest.raises(ConfigError, match="min_label=3: 5 documents against 0 others"):
        select("classifier", documents, classifier.Config(labels=[str(tmp_path / "one.jsonl")]))
    for line in ('{"text": "x"}', "{broken", '{"score": 3}', '{"text": "x", "score": "high"}'):
        (tmp_path / "bad.jsonl").write_text('{"text": "x", "score": 1}\n' + line)
        with pytest.raises(CuveeError, match="record 2 of bad.jsonl/bad.jsonl has no text with a number"):
            select("classifier", documents, classifier.Config(labels=[str(tmp_path / "bad.jsonl")]))
    with pytest.raises(ConfigError, match="teacher: is empty"):
        judge.check(judge.Config(), {})


def test_safety_by_area(tmp_path):
    seeds = {area: [write(tmp_path / f"{area}.jsonl", area, 60)] for area in ("violence", "sexual")}
    kinds = ["science"] * 100 + ["violence"] * 10 + ["sexual"] * 10 + ["news"] * 20
    documents = [Document(f"{kind}{i}", text(kind, 1000 + i)) for i, kind in enumerate(kinds)]
    reasons = select("safety", documents, safety.Config(seeds=seeds, sample=1.0, max_score=0.3))
    found = dict.fromkeys(kinds, 0) | {kind: sum(bool(reason) for one, reason in zip(kinds, reasons, strict=True) if one == kind) for kind in kinds}
    assert found["science"] == 0 and found["violence"] >= 8 and found["sexual"] >= 9
    assert {reason.partition(":")[0] for reason, kind in zip(reasons, kinds, strict=True) if kind == "sexual" and reason} == {"sexual"}
    harmless = [write(tmp_path / "harmless.jsonl", "news", 60, first=5000)]
    again = select("safety", documents, safety.Config(seeds=seeds, harmless=harmless, sample=1.0, max_score=0.3))
    assert not any(again[-20:]) and sum(map(bool, again[100:120])) >= 18
    assert safety.external(safety.Config(seeds=seeds, harmless=harmless)).keys() == {"violence", "sexual", "harmless"}
    one, config = [Document("a", "blood and gore"), Document("b", "a b c")], classifier.Config()
    good, others = classifier.features(one[:1] * 4, config), [classifier.features(one[1:] * 4, config)]
    assert (classifier.fit(good, others, "") == classifier.fit(good, others, "")).all(), "an area's fit leaves the others as they were"


@pytest.mark.parametrize("values, sentence", [
    ({}, "seeds: is empty"), ({"seeds": {"violense": ["x"]}}, "did you mean 'violence'"),
    ({"seeds": {"csea": ["x"]}, "max_score": 1.0}, "max_score 1.0 must lie"),
])
def test_safety_refuses(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        safety.check(safety.Config(**values))


def test_the_recipe_of_a_judge_composes():
    from flows.config import compose
    from flows.graph import Graph

    graph = Graph(compose(["recipe=curation", "+data=judged", "scale=micro", "judge.teacher={model: m, url: 'http://127.0.0.1:1/v1'}"]))
    assert list(graph.nodes) == ["first", "labels", "corpus"] and "classifier" not in graph.nodes["first"].config.blocks
    assert graph.nodes["corpus"].parents == [graph.nodes["labels"]] and len({node.fingerprint for node in graph.nodes.values()}) == 3
    with pytest.raises(ConfigError, match="teacher: is empty"):
        Graph(compose(["recipe=curation", "+data=judged", "scale=micro"]))
