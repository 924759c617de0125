"""Gradient steps: against a plain transformers loop, under any packing, with bad losses, pairs and reference models."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.objectives import bradley_terry, ce
from stages.stage import ConfigError, Context, CuveeError
from stages.trainer.batch import Loss, Sequence
from stages.trainer.config import TrainConfig
from stages.trainer.loop import train
from stages.trainer.microbatch import split
from stages.trainer.trainer import Trainer
from tests.resume.trainer_run import SIZES, Counting, config
from tests.unit.tiny import tokenizer


def cross_entropy(batch):
    return ce.loss(batch, ce.Config())


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


def run(tmp_path, words, stream=None, objective=cross_entropy, name="run", **options):
    (tmp_path / name / "out").mkdir(parents=True)
    ctx = Context(tmp_path / name)
    changes = options.pop("config", {})
    options = {"model": SIZES} | options
    metrics = train(
        config=config(save_every=0, **changes), stream=stream or Counting(), objective=objective,
        out=tmp_path / name / "out", ctx=ctx, tokenizer=words, **options,
    )  # fmt: skip
    return metrics, tmp_path / name / "out"


def losses(c: TrainConfig, steps: int, **options) -> list[dict[str, float]]:
    trainer = Trainer(c, SIZES, options.pop("objective", cross_entropy), **options)
    stream = Counting()
    return [trainer.step(stream.batch(step, trainer), c.learning_rate(step)) for step in range(steps)]


def test_equals_a_plain_transformers_loop():
    """Same initial weights, batches, AdamW, clipping and schedule, one document at a time: the same losses."""
    from transformers import Cohere2Config, Cohere2ForCausalLM

    c = config(weight_decay=0.1, clip_grad=0.5, lr=5e-3)
    trainer = Trainer(c, SIZES, cross_entropy)
    hf = SIZES.to_hf() | {"eos_token_id": None, "bos_token_id": None}
    plain = Cohere2ForCausalLM(Cohere2Config(**hf))
    plain.load_state_dict(trainer.hf_state(), strict=False)
    decayed = [p for p in plain.parameters() if p.dim() > 1]
    norms = [p for p in plain.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        betas=(c.beta1, c.beta2), eps=c.epsilon,
    )  # fmt: skip
    for step in range(8):
        groups = Counting().batch(step, None)
        ours = trainer.step(groups, c.learning_rate(step))
        total, count = 0.0, 0.0
        for s in (s for group in groups for s in group):
            ids = torch.from_numpy(s.tokens.astype(np.int64))
            logprobs = plain(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            mask = torch.from_numpy(s.mask[1:])
            total, count = total - (logprobs * mask).sum(), count + float(mask.sum())
        adam.zero_grad()
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = c.learning_rate(step)
        adam.step()
        assert ours["loss"] == pytest.approx(float(total) / count, abs=2e-5)
        assert ours["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    ours = trainer.hf_state()
    assert max(float((ours[k] - v).abs().max()) for k, v in plain.state_dict().items() if k in ours) < 1e-4


def test_microbatches_do_not_change_the_loss():
    found = [losses(config(micro_batch_tokens=n), 5) for n in (60, 150, 100_000)]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_repeating_a_run_gives_the_same_bytes_and_another_seed_others(tmp_path, words):
    a, b, other = (
        run(tmp_path, words, name=n, config={"seed": s, "steps": 3})[1] for n, s in (("a", 1), ("b", 1), ("c", 2))
    )
    read = lambda folder: (folder / "model.safetensors").read_bytes()  # noqa: E731
    assert read(a) == read(b) != read(other)


def test_logprobs_are_transformers(tmp_path, words):
    from transformers import Cohere2ForCausalLM

    _, out = run(tmp_path, words, config={"steps": 3})
    trainer = Trainer(config(), SIZES, cross_entropy, init=out)
    groups = Counting(seed=9).batch(0, None)
    found = trainer.logprobs(groups)
    model = Cohere2ForCausalLM.from_pretrained(out).eval()
    sequences = [s for group in groups for s in group]
    assert len(found) == len(sequences)
    for ours, s in zip(found, sequences, strict=True):
        ids = torch.from_numpy(s.tokens.astype(np.int64))
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy()
        assert ours.shape == (len(s.tokens) - 1,) and not ours[s.mask[1:] == 0].any()
        assert np.abs(ours - logprobs * (s.mask[1:] != 0)).max() < 1e-5
    state = trainer.hf_state()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items() if k in state)


def test_reference_is_frozen_and_starts_equal(tmp_path, words):
    _, out = run(tmp_path, words, config={"steps": 2, "warmup_steps": 0})
    gaps = []

    def objective(batch):
        gaps.append(float((batch.logprobs - batch.reference).detach().abs().max()))
        return cross_entropy(batch)

    run(tmp_path, words, objective=objective, name="on", init=out, model=None, reference=out,
        config={"steps": 3, "micro_batch_tokens": 10_000})  # fmt: skip
    assert gaps[0] < 1e-6 < 1e-3 < gaps[1] < gaps[2]


class Pairs:
    """Noise in the lower half of the vocabulary (chosen) against noise in the upper."""

    def batch(self, step, trainer):
        rng = np.random.default_rng([5, step])
        groups = []
        for _ in range(8):
            low, high = rng.integers(8, 148, 20).astype(np.int32), rng.integers(148, 288, 20).astype(np.int32)
            label = {"label": 1.0, "margin": 0.0}
            ones = np.ones(20, np.float32)
            groups.append(
                [Sequence(low, ones, {"chosen": 1.0, **label}), Sequence(high, ones, {"chosen": 0.0, **label})]
            )
        return groups


def test_reward_head_learns_and_is_read_back(tmp_path, words):
    from safetensors.torch import load_file
    from transformers import Cohere2Model

    _, base = run(tmp_path, words, config={"steps": 1, "warmup_steps": 0})
    objective = lambda batch: bradley_terry.loss(batch, bradley_terry.Config())  # noqa: E731
    metrics, out = run(tmp_path, words, stream=Pairs(), objective=objective, name="reward", head="reward", init=base,
                       model=None, config={"steps": 30, "lr": 3e-3})  # fmt: skip
    assert metrics["loss_first"] == pytest.approx(math.log(2), abs=0.3) and metrics["loss"] < 0.2
    assert metrics["accuracy"] > 0.95
    score = load_file(out / "model.safetensors")["score.weight"]
    assert score.shape == (1, SIZES.hidden_size)
    model = Cohere2Model.from_pretrained(out).eval()
    right = 0
    for chosen, rejected in Pairs().batch(99, None):
        with torch.no_grad():
            ids = torch.from_numpy(np.stack([chosen.tokens, rejected.tokens]).astype(np.int64))
            a, b = model(ids).last_hidden_state[:, -1] @ score[0]
        right += bool(a > b)
    assert right == 8
    with pytest.raises(CuveeError, match="unknown score.weight"):
        Trainer(config(), SIZES, objective, init=out)


def test_bad_losses_are_skipped_and_counted(tmp_path, words):
    bad = {2, 3}
    step = iter(range(100))

    def objective(batch):
        loss = cross_entropy(batch)
        return Loss(loss.sum * math.nan, loss.count) if next(step) in bad else loss

    changes = {"steps": 6, "micro_batch_tokens": 100_000}
    metrics, out = run(tmp_path, words, objective=objective, config=changes)
    assert metrics["skipped"] == 2 and math.isfinite(metrics["loss"])
    model = torch.cat([t.flatten() for t in Trainer(config(), SIZES, objective, init=out).hf_state().values()])
    assert model.isfinite().all()


def test_an_infinite_gradient_leaves_the_weights_alone():
    def objective(batch):  # sqrt has a finite value and an infinite slope at 0
        zero = (batch.logprobs * 0).sum().abs().sqrt()
        return Loss(cross_entropy(batch).sum + zero, batch.mask.sum())

    trainer = Trainer(config(), SIZES, objective)
    before = trainer.hf_state()
    metrics = trainer.step(Counting().batch(0, None), 1e-2)
    assert metrics["skipped"] == 1 and math.isfinite(metrics["loss"]) and not math.isfinite(metrics["grad_norm"])
    after = trainer.hf_state()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_step_with_nothing_to_learn_from_passes(tmp_path, words):
    class Sparse(Counting):
        def batch(self, step, trainer):
            return super().batch(step, trainer) if step == 1 else []

    metrics, out = run(tmp_path, words, stream=Sparse(), config={"steps": 4})
    assert metrics["steps"] == 4 and metrics["skipped"] == 0 and math.isfinite(metrics["loss_first"])
    trainer = Trainer(config(), SIZES, cross_entropy)
    trainer.step(Counting().batch(1, None), config(steps=4).learning_rate(1))
    expected, found = trainer.hf_state(), Trainer(config(), SIZES, cross_entropy, init=out).hf_state()
    assert all(torch.equal(expected[k], found[k]) for k in expected)


def test_too_many_bad_losses_in_a_row_stop_the_run(tmp_path, words):
    with pytest.raises(CuveeError, match="max_skipped: .* 4 steps in a row"):
        run(tmp_path, words, objective=lambda b: Loss(b.logprobs.sum() * math.nan, 1.0), config={"max_skipped": 3})


@pytest.mark.parametrize("tokens,message", [
    (np.array([5, 288], np.int32), "token id 288 is outside"),
    (np.array([5, -1], np.int32), "token id -1 is outside"),
    (np.zeros(65, np.int32), "max_position_embeddings 64"),
    (np.zeros(0, np.int32), "shortest 0"),
])  # fmt: skip
def test_bad_sequences_are_one_sentence(tokens, message):
    trainer = Trainer(config(), SIZES, cross_entropy)
    with pytest.raises(CuveeError, match=message):
        trainer.step([[Sequence(tokens, np.ones(len(tokens), np.float32))]], 1e-3)


def test_refusals(tmp_path, words):
    with pytest.raises(ConfigError, match="steps: 0"):
        run(tmp_path, words, name="a", config={"steps": 0})
    with pytest.raises(CuveeError, match="vocab_size: 200 rows cannot hold"):
        run(tmp_path, words, name="b", model=replace(SIZES, vocab_size=200))
    with pytest.raises(ConfigError, match="tensor_parallel 2"):
        run(tmp_path, words, name="c", config={"tensor_parallel": 2})


def test_schedules():
    def rates(**values):
        return [round(TrainConfig(steps=10, lr=1.0, min_lr=0.1, **values).learning_rate(s), 4) for s in range(10)]

    assert rates(schedule="constant", warmup_steps=2)[:3] == [0.5, 1.0, 1.0]
    assert rates(schedule="linear")[0] == 1.0 and rates(schedule="linear")[-1] == 0.1
    assert rates(schedule="cosine", warmup_steps=1)[1] == 1.0 and rates(schedule="cosine")[-1] == 0.1
    assert rates(schedule="wsd", decay_steps=4)[:7] == [1.0] * 7 and rates(schedule="wsd", decay_steps=4)[-1] == 0.1
    assert all(a >= b for a, b in zip(rates(schedule="cosine"), rates(schedule="cosine")[1:], strict=False))


def test_split_holds_the_budget_and_balances():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = [int(n) for n in rng.integers(1, 300, rng.integers(4, 60))]
        for ranks in (1, 2, 4):
            bins = split(sizes, 512, ranks)
            assert len(bins) % ranks == 0 and all(bins)
            assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
            assert all(sum(sizes[i] for i in b) <= 512 for b in bins) or len(sizes) < 2 * len(bins)
    assert split([900, 10, 10], 512, 1) == [[0], [1, 2]]
    with pytest.raises(CuveeError, match="3 groups cannot be shared among 4"):
        split([1, 1, 1], 512, 4)
