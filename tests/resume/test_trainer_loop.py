"""The loop: schedules, precision by step, spikes, what is told of a run, batches built ahead."""

from __future__ import annotations

import json
import math
import threading

import pytest

from stages.objectives import ce
from stages.stage import ConfigError, CuveeError, parse
from stages.trainer import loop
from stages.trainer.batch import Loss
from stages.trainer.config import TrainConfig
from stages.trainer.loop import Progress, _spike, train
from tests.resume.test_trainer_checkpoints import Stop, Stopping, Told
from tests.resume.trainer_run import SIZES, Counting, config
from tests.unit.tiny import tokenizer


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


def run(root, words, stream=None, objective=None, model=SIZES, **changes):
    """(metrics, weights, log lines, metric points by step)"""
    ctx = Told(root / "scratch")
    for folder in ("out", "scratch"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    changes = {"save_every": 0, "async_save": False} | changes  # what is stopped has its last checkpoint, however slow the disk
    metrics = train(config=config(**changes), stream=stream or Counting(), tokenizer=words, ctx=ctx,
                    objective=objective or (lambda b: ce.loss(b, ce.Config())), out=root / "out", model=model)  # fmt: skip
    points = {p["step"]: p for p in map(json.loads, (root / "scratch/metrics.jsonl").read_text().splitlines())}
    return metrics, (root / "out/model.safetensors").read_bytes(), ctx.lines, points


def test_schedules_end_exactly_where_they_should():
    cooldown = TrainConfig(steps=50_000, lr=2.5e-4, min_lr=1e-6, schedule="linear")
    assert cooldown.learning_rate(0) == 2.5e-4 and cooldown.learning_rate(49_999) == 1e-6
    assert cooldown.learning_rate(25_000) == pytest.approx((2.5e-4 + 1e-6) / 2, rel=1e-4)
    llama = TrainConfig(steps=1_200_000, lr=8e-5, min_lr=8e-7, warmup_steps=8000, schedule="cosine")
    assert llama.learning_rate(0) == 8e-5 / 8000 and llama.learning_rate(7999) == llama.learning_rate(8000) == 8e-5
    assert llama.learning_rate(1_199_999) == 8e-7
    qwen = TrainConfig(steps=10_000, lr=3e-4, min_lr=3e-5, warmup_steps=2000, schedule="cosine")
    assert qwen.learning_rate(2000 + 4000) == pytest.approx((3e-4 + 3e-5) / 2, rel=1e-3)
    wsd = TrainConfig(steps=1000, lr=1e-3, min_lr=1e-5, warmup_steps=10, decay_steps=100, schedule="wsd")
    assert wsd.learning_rate(900) == 1e-3 > wsd.learning_rate(901) and wsd.learning_rate(999) == 1e-5


def test_precision_by_step():
    c = TrainConfig(steps=10, precision_phases=[["bf16", 2], ["fp8_delayed", 5], ["bf16", 3]])
    c.check()
    assert [c.precision_at(s) for s in range(10)] == ["bf16"] * 2 + ["fp8_delayed"] * 5 + ["bf16"] * 3
    assert TrainConfig(precision="fp8_blockwise").precision_at(999) == "fp8_blockwise"


@pytest.mark.parametrize("changes,message", [
    ({"precision_phases": [["bf16", 3]]}, "steps: 10, but precision_phases .* have 3"),
    ({"precision_phases": [["bf16", 5], ["fp32", 5]]}, "mixes fp32 with others"),
    ({"precision_phases": [["fp4", 10]]}, "precision_phases: 'fp4' is not known"),
    ({"precision_phases": ["bf16"]}, "'bf16' is no phase"),
    ({"precision": "bf61"}, "did you mean 'bf16'"),
    ({"spike_factor": 0.9}, "spike_factor: 0.9 calls ordinary"),
    ({"recompute": "some"}, "recompute: 'some' is not known"),
    ({"context_parallel": 0}, "context_parallel: 0 is not a positive"),
    ({"keep_every": -1}, "keep_every: -1 is negative"),
    ({"profile_steps": [3]}, "should be \\[first, last\\]"),
    ({"profile_steps": [3, 11], "profile_dir": "x"}, "end after the last step 10"),
    ({"profile_steps": [3, 4]}, "profile_dir: .* need a folder"),
])  # fmt: skip
def test_refusals(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse(TrainConfig, {"steps": 10} | changes, "").check()


@pytest.mark.parametrize("changes,message", [
    ({"precision": "bf16"}, "precision: bf16 needs a GPU .*fp32"),
    ({"precision_phases": [["fp8_delayed", 4], ["bf16", 8]]}, "precision: fp8_delayed needs a GPU .*fp32"),
])  # fmt: skip
def test_a_precision_that_the_machine_lacks_is_refused(tmp_path, words, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, words, **changes)
    assert not any((tmp_path / "out").iterdir()) and not any((tmp_path / "scratch").iterdir())


def test_precision_changes_at_its_steps_also_after_a_resume(tmp_path, words, monkeypatch):
    """With a trainer that only notes what it is asked for: a CPU has one precision."""
    asked, real = [], TrainConfig.precision_at

    class Noting(loop.Trainer):
        def __init__(self, *args):
            monkeypatch.setattr(TrainConfig, "precision_at", real)
            super().__init__(*args)
            found = lambda _, step: "bf16" if step < 2 or step > 8 else "fp8_delayed"  # noqa: E731
            monkeypatch.setattr(TrainConfig, "precision_at", found)

        def set_precision(self, name):
            asked.append(name)

        def step(self, groups, lr, limit=math.inf):
            asked.append(".")
            return super().step(groups, lr, limit)

    monkeypatch.setattr(loop, "Trainer", Noting)
    with pytest.raises(Stop):
        run(tmp_path, words, stream=Stopping(6), save_every=5)
    assert "".join(asked) == "..fp8_delayed...."
    asked.clear()
    _, _, lines, _ = run(tmp_path, words, stream=Stopping(), save_every=5)
    assert "".join(asked) == "fp8_delayed....bf16..."
    assert "precision is bf16 from step 10 on" in lines


def spiking(at: set[int], asked: list[int]):
    """Cross-entropy, times 3 in the given steps. The objective sees each step once: one microbatch."""

    def objective(batch):
        loss = ce.loss(batch, ce.Config())
        return Loss(loss.sum * 3, loss.count, loss.metrics) if asked[-1] in at else loss

    return objective


class Asked(Stopping):
    def __init__(self, at=-1):
        super().__init__(at)
        self.steps = []

    def batch(self, step, trainer):
        self.steps.append(step)
        return super().batch(step, trainer)


def spike_run(root, words, bad, at=-1, **changes):
    stream = Asked(at)
    changes = {"steps": 24, "micro_batch_tokens": 100_000, "spike_factor": 2.0, "lr": 1e-4, "min_lr": 1e-4} | changes
    return run(root, words, stream, spiking(bad, stream.steps), **changes)


def test_spikes_are_logged_and_counted_and_skipped_on_request(tmp_path, words):
    bad = {3, 18, 20}  # the first comes before enough is known to judge
    seen, weights, lines, _ = spike_run(tmp_path / "seen", words, bad)
    assert seen["spikes"] == 2 and seen["skipped"] == 0
    told = [line.split(":")[0] for line in lines if "is a spike, above" in line]
    assert told == ["step 19", "step 21"]
    skipped, other, _, _ = spike_run(tmp_path / "skipped", words, bad, skip_spikes=True)
    assert skipped["spikes"] == skipped["skipped"] == 2 and weights != other
    with pytest.raises(Stop):
        spike_run(tmp_path / "again", words, bad, at=19, skip_spikes=True, save_every=18)
    assert spike_run(tmp_path / "again", words, bad, skip_spikes=True, save_every=18)[:2] == (skipped, other)


def test_too_many_spikes_in_a_row_stop_the_run_and_are_named(tmp_path, words):
    with pytest.raises(CuveeError, match="max_skipped: .* a spike in 3 steps in a row, 19 to 21 "):
        spike_run(tmp_path, words, set(range(18, 24)), skip_spikes=True, max_skipped=2)


def test_a_spike_needs_a_scale():
    c = config(spike_factor=2.0)
    assert _spike(c, Progress(losses=[1.0] * 15)) == math.inf  # too few
    assert _spike(c, Progress(losses=[1.0] * 15 + [100.0])) == 2.0  # a median, not a mean
    assert _spike(c, Progress(losses=[-1.0] * 20)) == math.inf
    assert _spike(config(), Progress(losses=[1.0] * 20)) == math.inf  # off


def test_a_first_loss_far_from_a_guess_is_warned_of(tmp_path, words):
    _, _, lines, _ = run(tmp_path / "new", words, steps=1, warmup_steps=0)
    assert not any("warning" in line for line in lines)
    changed = type(SIZES)(**vars(SIZES) | {"logit_scale": 100.0})
    _, _, lines, _ = run(tmp_path / "odd", words, model=changed, steps=1, warmup_steps=0)
    assert any(line.startswith("warning: the first loss is") and "5.663" in line for line in lines)


def test_speed_is_told(tmp_path, words):
    """The last line and point: FLOPs a second are tokens a second times the FLOPs a token that flops.py counts."""
    _, _, lines, points = run(tmp_path, words)
    assert "eta 0s" in lines[-1] and all(f" {name} " in lines[-1] for name in ("tokens/s", "TFLOP/s", "data", "memory"))
    last = points[12]
    assert 0 <= last["data_wait"] < 0.9 and 0.05 < last["peak_memory_gib"] < 64 and last["lr"] == 0.0
    per_token = 6 * (SIZES.parameters() - SIZES.vocab_size * SIZES.hidden_size)  # the least: without output layer
    most = 6 * SIZES.parameters() + 12 * SIZES.num_layers * SIZES.hidden_size * 50
    assert per_token < last["tflops_per_gpu"] * 1e12 / last["tokens_per_second"] < most


def test_a_trace_of_the_profiled_steps_is_written(tmp_path, words):
    run(tmp_path, words, steps=4, profile_steps=[2, 3], profile_dir=str(tmp_path / "trace"))
    files = list((tmp_path / "trace").iterdir())
    assert [file.name for file in files] == ["steps-2-3.json"]
    events = json.loads(files[0].read_text())["traceEvents"]
    assert any("aten::mm" in str(event.get("name")) for event in events)


class Ahead(Counting):
    """Counting that may be built in a thread, and notes where and when it was."""

    prefetchable = True

    def __init__(self, fails_at: int = -1):
        super().__init__()
        self.fails_at, self.notes = fails_at, []

    def batch(self, step, trainer):
        self.notes.append((step, threading.current_thread() is threading.main_thread()))
        if step == self.fails_at:
            raise CuveeError("blend: the data of this step is gone")
        return super().batch(step, trainer)


def test_batches_built_ahead_are_the_same(tmp_path, words):
    ahead, plain = Ahead(), Ahead()
    first = run(tmp_path / "a", words, ahead)
    second = run(tmp_path / "b", words, plain, prefetch=False)
    assert first[0] == second[0] and first[1] == second[1]
    assert ahead.notes == [(step, False) for step in range(12)] and plain.notes == [(step, True) for step in range(12)]


def test_the_next_batch_is_built_while_a_step_runs(tmp_path, words):
    """Every step waits until the next batch is being built: without a thread this would time out."""
    stream, reached = Ahead(), {step: threading.Event() for step in range(13)}
    build = stream.batch

    def batch(step, trainer):
        reached[step].set()
        return build(step, trainer)

    def objective(packed):
        step = len([e for e in reached.values() if e.is_set()])
        assert step == 12 or reached[step - 1].wait(120)
        return ce.loss(packed, ce.Config())

    stream.batch = batch
    run(tmp_path, words, stream, objective)


def test_an_error_of_the_thread_is_itself(tmp_path, words):
    with pytest.raises(CuveeError, match="blend: the data of this step is gone"):
        run(tmp_path, words, Ahead(fails_at=5))
    assert (tmp_path / "scratch/metrics.jsonl").read_text().count("\n") == 5  # the steps before it were taken
