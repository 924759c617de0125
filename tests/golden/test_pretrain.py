"""The pretraining stage on a small synthetic corpus: golden losses of the first steps, and the order of its documents.

`python tests/golden/test_pretrain.py` writes losses.json anew, for a change that is meant to alter training.
"""

from __future__ import annotations

import json
import shutil
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
from stages.run import AGAIN
from stages.stage import ConfigError, Context, CuveeError, Kind, identity, parse
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


def test_documents_without_a_target_are_refused(tokens, tmp_path):
    shutil.copytree(tokens, tmp_path / "tokens")
    write(tmp_path / "tokens/train-down", [[5], [6]], 100)
    with pytest.raises(CuveeError, match="blend: no document of domain down has two tokens"):
        Documents(config(phases=[[64, 5]]), tmp_path / "tokens")


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


def test_command_a_extends_its_context(tokens):
    """8k, 32k, 128k, 256k for 30,000, 10,000, 5,000, 5,000 steps; long documents every 4th; a layout for each."""
    phases = [[8192, 30_000], [32_768, 10_000], [131_072, 5_000], [262_144, 5_000]]
    placed = [{}, {}, {"context_parallel": 4, "recompute": "full"}, {"context_parallel": 8, "recompute": "full"}]
    c = config(
        steps=50_000, phases=phases, long_every=4, batch_tokens=4_194_304, lr=2.5e-4, min_lr=1e-6, schedule="linear",
        warmup_steps=0, phase_placement=placed, model=MODEL | {"max_position_embeddings": 262_144},
    )  # fmt: skip
    pretrain.check(c, {"tokens": None})
    assert [c.phase(s) for s in (0, 29_999, 30_000, 44_999, 45_000, 49_999)] == [
        (0, 0), (0, 29_999), (1, 0), (2, 4_999), (3, 0), (3, 4_999)
    ]  # fmt: skip
    assert [c.placed(s).context_parallel for s in (39_999, 40_000, 45_000)] == [1, 4, 8] and c.placed(0) == c
    assert c.learning_rate(0) == 2.5e-4 and c.learning_rate(49_999) == 1e-6
    assert identity(c) == identity(config(**identity(c)))  # the layouts are not part of it


def test_every_number_of_ranks_trains_on_the_same_documents(tokens):
    """The batch is one; ranks share it without rest, and any rank could be asked for any step first."""
    from stages.trainer.microbatch import split

    batch = Documents(config(batch_tokens=4096), tokens).batch(3, None)
    sizes = [len(group[0].tokens) for group in batch]
    for ranks in (1, 2, 4):
        shares = [split(sizes, 512, ranks)[rank::ranks] for rank in range(ranks)]
        assert sorted(i for share in shares for part in share for i in part) == list(range(len(batch)))
        assert len({len(share) for share in shares}) == 1  # as many microbatches on each


def test_phases_of_another_layout_start_again_with_the_same_result(tokens, tmp_path):
    inputs = {"tokens": artifact(tokens, Kind.TOKENS)}
    values = {"steps": 6, "phases": [[64, 2], [96, 4]], "model": MODEL | {"max_position_embeddings": 96}}
    layouts = {"phase_placement": [{}, {"log_every": 1}]}  # which changes no rounding, as a layout may
    found = []
    for name, c in (("one", config(**values)), ("two", config(**values | layouts))):
        for folder in ("out", "scratch"):
            (tmp_path / name / folder).mkdir(parents=True)
        pretrain.check(c, inputs)
        ctx = Context(tmp_path / name / "scratch")
        for _ in range(1 + bool(c.phase_placement)):
            try:
                pretrain.run(c, inputs, tmp_path / name / "out", ctx)
            except SystemExit as stop:
                assert stop.code == AGAIN and name == "two"
                assert [p.name for p in (ctx.scratch / "checkpoints").iterdir()] == ["0000000002"]
        found.append((tmp_path / name / "out/model.safetensors").read_bytes())
    assert found[0] == found[1]
    assert (ctx.scratch / "metrics.jsonl").read_text().count("\n") == 6


def test_a_run_does_not_go_on_with_other_data(tokens, tmp_path):
    other = corpus(tmp_path / "other")
    (tmp_path / "out").mkdir()
    c, ctx = config(phase_placement=[{}, {"log_every": 1}], phases=[[64, 4], [64, 4]]), Context(tmp_path)
    with pytest.raises(SystemExit):
        pretrain.run(c, {"tokens": artifact(tokens, Kind.TOKENS)}, tmp_path / "out", ctx)
    with pytest.raises(CuveeError, match="made with data tokens instead of other; go back to that configuration"):
        pretrain.run(c, {"tokens": artifact(other, Kind.TOKENS)}, tmp_path / "out", ctx)


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
        ({"phase_placement": [{}, {}]}, "phase_placement: 2 entries for 1 phases"),
        ({"phase_placement": [{"contxt_parallel": 2}]}, "did you mean 'context_parallel'"),
        ({"phase_placement": [{"lr": 1.0}]}, "phase_placement.0.: 'lr' is not known"),
        ({"fsdp": True, "phase_placement": [{"tensor_parallel": 2}]}, "'tensor_parallel' is not known"),
        ({"phase_placement": [{"fsdp": True}]}, "phase_placement.0.: 'fsdp' is not known"),
        ({"phase_placement": [{"log_every": 0}]}, "phase_placement.0..log_every: 0 is not a positive"),
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
