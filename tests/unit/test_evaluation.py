"""Evaluation: intervals and perplexity against independent computations, then the stage with a tiny model."""

from __future__ import annotations

import json
import math
import random
import shutil

import pytest
import tiny
import torch

from stages.data import indexed
from stages.evaluation import choose, evaluate
from stages.evaluation.perplexity import byte_lengths, measure, windows
from stages.evaluation.stats import paired, wilson, win_rate
from stages.stage import ConfigError, CuveeError, Kind, resolve


def test_wilson_agrees_with_the_published_interval():
    mean, low, high = wilson([1.0] * 15 + [0.0] * 5)
    assert (mean, round(low, 4), round(high, 4)) == (0.75, 0.5313, 0.8881)
    assert wilson([0.0] * 40)[2] == pytest.approx(0.0876, abs=1e-4)  # no success is not "certainly none"


def test_wilson_covers_partial_credit():
    draw = random.Random(0)
    covered = 0
    for _ in range(400):
        scores = [draw.choice([0.0, 0.25, 0.5, 1.0]) for _ in range(40)]
        _, low, high = wilson(scores)
        covered += low <= 0.4375 <= high
    assert covered / 400 >= 0.95


def test_paired_is_the_adjusted_wald_interval():
    """Of 50 prompts 12 are won and 3 lost: d = (12 - 3) / 52, se^2 = ((12 + 1 + 3 + 1) / 52 - d^2) / 52."""
    after, before = [1.0] * 12 + [0.0] * 3 + [1.0] * 35, [0.0] * 12 + [1.0] * 3 + [1.0] * 35
    half = 1.959964 * math.sqrt((17 / 52 - (9 / 52) ** 2) / 52)
    assert paired(after, before) == pytest.approx((0.18, 9 / 52 - half, 9 / 52 + half), abs=1e-6)


def test_equal_answers_are_no_proof_of_equal_models():
    mean, low, high = paired([0.0] * 40, [0.0] * 40)
    assert mean == 0.0 and -low == high == pytest.approx(0.066, abs=1e-3)


def test_paired_covers_the_true_difference():
    draw, covered = random.Random(1), 0
    for _ in range(400):
        hard = [draw.random() for _ in range(40)]
        scores = [[float(draw.random() * 0.3 + h * 0.7 < p) for h in hard] for p in (0.35, 0.5)]
        _, low, high = paired(scores[1], scores[0])
        covered += low <= 0.15 / 0.7 <= high
    assert covered / 400 >= 0.94


def test_win_rate_counts_ties_half():
    assert win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 3.0, 1.0])[0] == 0.5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, model):
    """Two held-out files, as data.tokens writes them."""
    from transformers import AutoTokenizer

    folder, tokenizer = tmp_path_factory.mktemp("tokens"), AutoTokenizer.from_pretrained(model)
    texts = {
        "prose": ["A short text.", "Grüße aus dem Süden, 漢字 und mehr, " * 3],
        "code": ["def f(x):\n    return x\n" * 4],
    }
    for domain, some in texts.items():
        documents = [[5, *tokenizer.encode(text, add_special_tokens=False)] for text in some]
        indexed.write(folder / f"heldout-{domain}", documents, 276)
    splits = {"heldout": {domain: {"documents": len(some)} for domain, some in texts.items()}}
    (folder / "tokens.json").write_text(json.dumps({"vocab_size": 276, "splits": splits}))
    tiny.tokenizer(folder / "tokenizer")
    return folder, texts


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_perplexity_equals_the_model_text_by_text(model, tokens, batch_tokens):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, texts = tokens
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    bytes_of = byte_lengths(tokenizer, 276)
    found = measure(network, windows(folder / "heldout-prose", 10**6, 512), bytes_of, batch_tokens)
    nats, count = 0.0, 0
    for text in texts["prose"]:
        ids = torch.tensor([[5, *tokenizer.encode(text, add_special_tokens=False)]])
        with torch.no_grad():
            nats += float(network(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    size = sum(len(text.encode()) for text in texts["prose"])
    assert (found["tokens"], found["bytes"]) == (count, size)
    assert found["nats_per_token"] == pytest.approx(nats / count, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)


def test_windows_stay_inside_documents_and_within_the_limit(tokens):
    folder, texts = tokens
    pieces = windows(folder / "heldout-prose", 50, 20)
    assert [len(piece) for piece in pieces] == [14, 20, 16]
    assert pieces[0][0] == pieces[1][0] == 5 and pieces[2][0] != 5


def prompts(folder, domain, count, **options):
    task = resolve("tasks", domain)
    documents = [{"text": "The quick brown fox jumps over the lazy dog near the river. " * 5, "domain": "prose"}]
    rows = task.generate(random.Random(0), count, documents, task.Options(**options))
    tiny.jsonl(
        folder / "heldout.jsonl", [{"id": f"{domain}-{i}", "domain": domain, **row} for i, row in enumerate(rows)]
    )
    return tiny.artifact(folder, Kind.PROMPTS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, model, tokens):
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("inputs")
    reward = shutil.copytree(model, root / "reward")
    weights = load_file(reward / "model.safetensors")
    save_file(weights | {"score.weight": torch.ones(1, 16)}, reward / "model.safetensors", {"format": "pt"})
    return {
        "model": tiny.artifact(model, Kind.CHECKPOINT),
        "prompts": {
            "math": prompts(root / "math", "math", 6),
            "long_context": prompts(root / "long", "long_context", 6, lengths=[120, 240], keys=1),
        },
        "tokens": tiny.artifact(tokens[0], Kind.TOKENS),
        "reward": tiny.artifact(reward, Kind.REWARD_MODEL),
    }


def run(inputs, out, **config):
    out.mkdir()
    values = {"max_new_tokens": 8, "perplexity_length": 64, "dtype": "float32", "prompts_per_domain": 4} | config
    return evaluate.run(evaluate.Config(**values), inputs, out, tiny.context(out.with_name("scratch")))


def test_stage_scores_every_domain(inputs, tmp_path):
    metrics = run(inputs, tmp_path / "out")
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert set(scores["domains"]) == {"math", "long_context"} and scores["domains"]["math"]["n"] == 4
    assert set(scores["lengths"]["long_context"]) == {"120", "240"} and "math" not in scores["lengths"]
    assert set(scores["perplexity"]) == {"code", "prose"}
    assert scores["perplexity"]["code"]["nats_per_token"] > math.log(2)
    assert scores["digests"].keys() == {"tokenizer", "template", "prompts"}
    assert scores["engine"]["max_new_tokens"] == 8
    assert metrics["score"] == pytest.approx((metrics["score/math"] + metrics["score/long_context"]) / 2)
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(
        {"id", "domain", "prompt", "answer", "completion", "reward", "score", "reward_model"} <= row.keys()
        for row in rows
    )
    assert all(row["tokens"] <= 8 for row in rows)


def test_an_engine_s_options_are_checked_and_no_part_of_the_scores(inputs, tmp_path, monkeypatch):
    for module in (evaluate, choose):
        with pytest.raises(ConfigError, match="engine_options.url: '' is no address"):
            module.check(module.Config(engine="openai"), inputs)
        with pytest.raises(ConfigError, match="engine_options: url given, but engine transformers has none"):
            module.check(module.Config(engine_options={"url": "http://127.0.0.1:1/v1"}), inputs)
    engine, given = resolve("rollout/engines", "transformers"), []

    class Noting(engine.Engine):
        def __init__(self, path, ctx, state, options):
            given.append(options)
            super().__init__(path, ctx, state, options)

    monkeypatch.setattr(engine, "Engine", Noting)
    run(inputs, tmp_path / "out", engine_options={"url": "http://127.0.0.1:1/v1"}, perplexity_tokens=64)
    assert given == [{"url": "http://127.0.0.1:1/v1"}]
    assert "engine_options" not in json.loads((tmp_path / "out/scores.json").read_text())["engine"]


def test_scores_are_those_of_the_verifier_on_what_the_model_writes(inputs, tmp_path, monkeypatch):
    """A model that always answers rightly scores 1: engine, rendering, verifier and summary fit together."""
    engine = resolve("rollout/engines", "transformers")
    pending = []
    for _, source in sorted(inputs["prompts"].items()):  # the stage goes through the domains by name
        with open(source.path / "heldout.jsonl") as file:
            pending.append([json.loads(line)["answer"] for line in file][:4])

    class Oracle(engine.Engine):
        def generate(self, prompts, *, n, max_new_tokens, temperature, seed, stop):
            assert (len(prompts), n, temperature, len(stop)) == (4, 1, 0.0, 1)
            return [[engine.Completion([*self.tokenizer.encode(text), *stop], text, [])] for text in pending.pop(0)]

    monkeypatch.setattr(engine, "Engine", Oracle)
    metrics = run(inputs, tmp_path / "out")
    assert metrics["score/math"] == metrics["score/long_context"] == 1.0
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["domains"]["math"]["solved"] == scores["domains"]["math"]["ended"] == 1.0


def test_bytes_do_not_depend_on_the_order_of_the_domains(inputs, tmp_path):
    run(inputs, tmp_path / "a")
    run(inputs | {"prompts": dict(reversed(inputs["prompts"].items()))}, tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_refuses_artifacts_of_another_tokenizer(inputs, tmp_path):
    other = shutil.copytree(inputs["tokens"].path, tmp_path / "tokens")
    text = (other / "tokenizer/tokenizer.json").read_text()
    (other / "tokenizer/tokenizer.json").write_text(text.replace("<MASK_TOKEN>", "<OTHER_TOKEN>"))
    with pytest.raises(CuveeError, match="the model's tokenizer .* is not that of the input tokens"):
        run(inputs | {"tokens": tiny.artifact(other, Kind.TOKENS)}, tmp_path / "out")
