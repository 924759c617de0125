"""The pretraining stage on a small synthetic corpus: golden losses of the first steps, and the order of its documents.

`python tests/golden/test_pretrain.py` writes losses.json anew, for a change that is meant to alter training.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from stages.data.indexed import write
from stages.model.config import ModelConfig
from stages.stage import ConfigError, Context, CuveeError, Kind, parse
from stages.train import pretrain
from stages.train._documents import Documents, Source
from tests.unit.tiny import artifact, tokenizer

GOLDEN = Path(__file__).with_name("losses.json")
TOLERANCE = 2e-4  # nats: what another CPU's or thread count's rounding may do in these steps
MODEL = dict(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=8,
    vocab_size=320, sliding_window=16, logit_scale=0.25, init_std=0.1, max_position_embeddings=64,
)  # fmt: skip
BASE = dict(
    steps=8, sequence_length=64, batch_tokens=1024, lr=1e-2, min_lr=1e-3, warmup_steps=2, micro_batch_tokens=512,
    blend={"up": 3.0, "down": 1.0}, max_epochs=50.0, model=MODEL, seed=1, log_every=4, save_every=0,
)  # fmt: skip
COOLDOWN = BASE | dict(
    steps=6, phases=[[96, 3], [128, 3]], long_every=3, lr=3e-3, min_lr=1e-5, schedule="linear", warmup_steps=0, blend={}
)
COOLDOWN.pop("model")


def corpus(out: Path) -> Path:
    """Two domains of documents that count: up (2 to 300 tokens) and down (2 to 40)."""
    rng, table = np.random.default_rng(0), {}
    out.mkdir(parents=True, exist_ok=True)
    for domain, sign, longest in (("up", 1, 300), ("down", -1, 40)):
        documents = [
            np.concatenate([[5], (rng.integers(0, 256) + sign * rng.integers(1, 3) * np.arange(n - 1)) % 256 + 20])
            for n in rng.integers(2, longest, 60)
        ]
        count, tokens = write(out / f"train-{domain}", documents, 320)
        table[domain] = {"documents": count, "tokens": tokens}
    (out / "tokens.json").write_text(json.dumps({"vocab_size": 320, "splits": {"train": table}}))
    tokenizer(out / "tokenizer")
    return out


def losses(root: Path) -> dict[str, list[float]]:
    """Losses of a pretraining and of a cooldown from it."""
    tokens, found, inputs = corpus(root / "tokens"), {}, {}
    for name, values in (("pretrain", BASE), ("cooldown", COOLDOWN)):
        config = parse(pretrain.Config, values, name)
        inputs = {"tokens": artifact(tokens, Kind.TOKENS), **inputs}
        pretrain.check(config, inputs)
        for folder in ("out", "scratch"):
            (root / name / folder).mkdir(parents=True)
        metrics = pretrain.run(config, inputs, root / name / "out", Context(root / name / "scratch"))
        assert metrics["steps"] == config.steps and metrics["skipped"] == 0
        lines = (root / name / "scratch/metrics.jsonl").read_text().splitlines()
        found[name] = [round(json.loads(line)["loss"], 5) for line in lines]
        inputs["init"] = artifact(root / name / "out", Kind.CHECKPOINT)
    return found


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus") / "tokens")


def config(**changes) -> pretrain.Config:
    return parse(pretrain.Config, BASE | changes, "pretrain")


def test_first_losses_are_golden(tmp_path):
    found, golden = losses(tmp_path), json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for name in golden:
        assert found[name] == pytest.approx(golden[name], abs=TOLERANCE), name
    written = json.loads((tmp_path / "cooldown/out/config.json").read_text())
    assert written["max_position_embeddings"] == 128  # the context was extended


def test_an_epoch_has_every_token_once(tokens):
    from stages.data.indexed import IndexedTokens

    file = IndexedTokens(tokens / "train-up")
    source = Source(file, 64, [0])
    assert source.tokens == file.lengths.sum()
    for epoch in range(2):
        steps = [source.take(epoch * source.tokens + a, epoch * source.tokens + a + 500)
                 for a in range(0, source.tokens - 500, 500)]  # fmt: skip
        steps.append(source.take(epoch * source.tokens + len(steps) * 500, (epoch + 1) * source.tokens))
        seen = np.concatenate([piece for step in steps for piece in step])
        assert Counter(seen.tolist()) == Counter(file.tokens.tolist())
        assert max(len(piece) for step in steps for piece in step) <= 64
    across = source.take(source.tokens - 300, source.tokens + 300)
    assert abs(sum(map(len, across)) - 600) <= 128


def test_a_step_is_found_without_those_before_it(tokens):
    c = config(phases=[[64, 5], [128, 3]], long_every=4)
    in_turn = [Documents(c, tokens).batch(step, None) for step in range(8)]
    stream = Documents(c, tokens)
    for step in (6, 3, 7, 0):
        again = stream.batch(step, None)
        assert all(np.array_equal(a[0].tokens, b[0].tokens) for a, b in zip(in_turn[step], again, strict=True))
    other = Documents(replace(c, seed=2), tokens).batch(0, None)
    assert len(other) != len(in_turn[0]) or any(
        not np.array_equal(a[0].tokens, b[0].tokens) for a, b in zip(in_turn[0], other, strict=True)
    )


def test_blend_and_long_documents(tokens):
    c = config(phases=[[64, 20], [128, 20]], steps=40, long_every=4, blend={"up": 1.0, "down": 1.0}, batch_tokens=1024)
    stream = Documents(c, tokens)
    batches = [stream.batch(step, None) for step in range(40)]
    size = lambda batch: sum(len(group[0].tokens) for group in batch)  # noqa: E731
    assert all(abs(size(batch) - 1024) < 300 for batch in batches)
    # "down" has no document longer than half a sequence of 128, so those steps are "up" alone
    assert all(min(len(group[0].tokens) for group in batches[step]) > 42 for step in (23, 27, 31, 35, 39))
    assert stream.drawn["up"] + stream.drawn["down"] == pytest.approx(40 * 1024)
    assert stream.drawn["down"] == pytest.approx((15 + 15) * 1024 / 2 + 5 * 1024 / 2)
    drawn = sum(size(batch) for batch in batches)
    assert drawn == pytest.approx(40 * 1024, rel=0.03)


def test_refusals(tokens, tmp_path):
    with pytest.raises(CuveeError, match="max_epochs: .* over domain"):
        Documents(config(max_epochs=0.5), tokens)
    with pytest.raises(CuveeError, match="did you mean 'down'"):
        Documents(config(blend={"dawn": 1.0}), tokens)
    with pytest.raises(CuveeError, match="long_every: no document is longer than 1000"):
        Documents(config(sequence_length=2000, long_every=2, batch_tokens=4000), tokens)
    for changes, message in [
        ({"steps": 9, "phases": [[64, 4], [128, 4]]}, "steps: 9, but phases"),
        ({"sequence_length": 128}, "model.max_position_embeddings: 64"),
        ({"batch_tokens": 32}, "batch_tokens: 32 is less than one sequence of 64"),
        ({"blend": {"up": -1.0}}, "blend"),
        ({"phases": [[64]]}, "should be a list of"),
        ({"model": MODEL | {"head_dim": 16}}, "model.head_dim: 16"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            pretrain.check(config(**changes), {"tokens": None})
    with pytest.raises(ConfigError, match="leave model out"):
        pretrain.check(config(), {"tokens": None, "init": None})


def test_estimate():
    class Parent:
        parameters = 7

    c = config()
    assert pretrain.estimate(c, {}).parameters == ModelConfig(**MODEL).parameters()
    assert pretrain.estimate(c, {"init": Parent}).parameters == 7
    assert pretrain.estimate(c, {}).train_tokens == 8 * 1024


if __name__ == "__main__":
    import tempfile

    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(losses(Path(folder)), indent=1) + "\n")
    print(GOLDEN.read_text())
