"""The post-training stages, end to end on a model of 30 thousand parameters: they run, learn, and resume bit for bit."""

import json
import random
from pathlib import Path

import pytest
from post_helpers import COMMON, RL, accuracy, artifact, context, killed_at, run
from tiny import jsonl

from stages.stage import ConfigError, CuveeError, Kind
from stages.train._critic import Criticised
from stages.train._rollouts import Rollouts


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, prompts):
    """Completions of which even digits are rewarded."""
    rows = [json.loads(line) for line in (prompts["math"].path / "train.jsonl").read_text().splitlines()]
    rng = random.Random(1)
    for row in rows:
        even, odd = rng.choice("2468"), rng.choice("13579")
        row.update(completions=[odd, even, "0"], rewards=[-1.0, 1.0, 0.5])
    folder = tmp_path_factory.mktemp("pairs")
    jsonl(folder / "samples.jsonl", rows)
    return artifact(folder, Kind.PAIRS)


def test_sft_raises_the_verifier_accuracy(start, tmp_path):
    """The answer is in the prompt: copy the number."""
    from stages.tasks import math as task

    rows = []
    for i in range(200):
        number = i % 10
        rows.append({
            "id": f"c{i}", "domain": "math", "messages": [{"role": "user", "content": f"Say {number}"}],
            "answer": str(number), "check": {"number": number},
        })  # fmt: skip
    assert task.verify(rows[3], "3") == 1.0
    jsonl(tmp_path / "prompts" / "train.jsonl", rows)
    jsonl(tmp_path / "prompts" / "heldout.jsonl", rows[:20])
    prompts = {"math": artifact(tmp_path / "prompts", Kind.PROMPTS)}
    before = accuracy(start.path, prompts["math"])
    values = {**COMMON, "steps": 60, "batch_groups": 20, "lr": 0.01}
    run("train.sft", values, tmp_path / "out", init=start, prompts=prompts)
    assert before < 0.2 and accuracy(tmp_path / "out", prompts["math"]) > 0.9


def test_sft_with_replay_and_best_of_n(start, pairs, prompts, tmp_path):
    import numpy as np

    from stages.data.indexed import write

    (tmp_path / "tokens").mkdir()
    write(tmp_path / "tokens" / "train-prose", [np.arange(20, 90) for _ in range(5)], 320)
    tokens = artifact(tmp_path / "tokens", Kind.TOKENS)
    values = {**COMMON, "steps": 3, "batch_groups": 8, "replay": 0.5}
    run("train.sft", values, tmp_path / "a", init=start, prompts=prompts, tokens=tokens)
    values = {**COMMON, "steps": 30, "batch_groups": 8, "lr": 0.01, "min_reward": 1.0}
    run("train.sft", values, tmp_path / "b", init=start, pairs=pairs)
    engine_prompts = prompts["math"]
    assert accuracy(tmp_path / "b", engine_prompts) == 0.0, "7 is odd: never the best of a prompt"
    with pytest.raises(CuveeError, match="min_reward: none of 64 prompts has a completion that ended"):
        run("train.sft", {**values, "min_reward": 2.0}, tmp_path / "c", init=start, pairs=pairs)


def test_sample_writes_rewarded_completions(speaker, prompts, tmp_path):
    values = {"prompts": 20, "completions": 3, "max_new_tokens": 6, "with_answer": True, "sequence_length": 128}
    metrics = run("rollout.sample", values, tmp_path / "a", policy=speaker, prompts=prompts)
    rows = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    for row in rows:
        assert len(row["completions"]) == len(row["rewards"]) == len(row["tokens"]) == 4
        assert row["completions"][-1] == row["answer"]
        assert row["rewards"] == row["parts"]["verifier"]
    assert metrics["tokens_per_second"] > 0 and -0.5 <= metrics["reward"] <= 1
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["prompts"] == 20 and summary["domains"]["math"]["prompts"] == 20
    run("rollout.sample", values, tmp_path / "b", policy=speaker, prompts=prompts)
    for name in ("samples.jsonl", "summary.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_reward_model_learns_the_preference_and_rewards_by_it(speaker, pairs, prompts, tmp_path):
    values = {**COMMON, "steps": 60, "batch_groups": 4, "lr": 0.01, "pairs_per_prompt": 3, "heldout": 0.2}
    metrics = run("train.reward", values, tmp_path / "reward", init=speaker, pairs=pairs)
    assert metrics["steps"] == 12, "one epoch over 50 prompts"
    assert next(iter(metrics)) == "heldout_accuracy"  # shown when the stage is done, as the first four are
    assert metrics["heldout_accuracy"] > 0.9 and metrics["heldout_pairs"] == 42
    reward = artifact(tmp_path / "reward", Kind.REWARD_MODEL)
    values = {"prompts": 8, "completions": 2, "max_new_tokens": 6, "rewards": {"reward_model": 1.0}}
    run("rollout.sample", values, tmp_path / "samples", policy=speaker, prompts=prompts, reward=reward)
    rows = [json.loads(line) for line in (tmp_path / "samples" / "samples.jsonl").read_text().splitlines()]
    assert all(row["rewards"] == row["parts"]["reward_model"] for row in rows)


@pytest.mark.parametrize("objective, options, lr", [
    ("dpo", {}, 0.003), ("ipo", {}, 0.003), ("ipo", {"average": False}, 0.003), ("srpo", {"beta": 0.05}, 0.003),
    ("copg", {"beta": 0.1}, 0.003), ("slic", {}, 0.003), ("kto", {}, 0.003),
])  # fmt: skip
def test_preference_prefers_what_was_rewarded(speaker, pairs, tmp_path, objective, options, lr):
    values = {**COMMON, "steps": 15, "batch_groups": 16, "lr": lr, "objective": objective, "options": options}
    values["sft_weight"] = 0.0 if objective == "kto" else 0.1
    run("train.preference", values, tmp_path / "out", init=speaker, pairs=pairs)
    assert preferred(tmp_path / "out", pairs) > preferred(speaker.path, pairs) + 0.3


def test_prompts_with_a_low_mean_reward_are_left_out(speaker, pairs, tmp_path):
    rows = [json.loads(line) for line in (pairs.path / "samples.jsonl").read_text().splitlines()]
    for row in rows[:40]:
        row["rewards"] = [-1.0, 0.5, -1.0]
    jsonl(tmp_path / "mixed" / "samples.jsonl", rows)
    mixed = artifact(tmp_path / "mixed", Kind.PAIRS)
    values = {**COMMON, "steps": 1, "batch_groups": 4, "objective": "dpo"}
    kept = {floor: run("train.preference", values | {"min_mean_reward": floor}, tmp_path / str(floor), init=speaker, pairs=mixed)
            ["prompts"] for floor in (None, 0.0)}  # fmt: skip
    assert kept == {None: len(rows), 0.0: len(rows) - 40}
    with pytest.raises(CuveeError, match="0 above min_mean_reward"):
        run("train.preference", values | {"min_mean_reward": 2.0}, tmp_path / "none", init=speaker, pairs=mixed)


def preferred(model: Path, pairs) -> float:
    """Mean over pairs of log p(rewarded digit) - log p(other digit), nats."""
    from stages.rollout._collect import answer_ids, render_prompt
    from stages.rollout.engines.transformers import Engine

    engine = Engine(model, context(model.parent / "engine"))
    gaps = []
    for line in (pairs.path / "samples.jsonl").read_text().splitlines()[:16]:
        row = json.loads(line)
        ids = render_prompt(engine.tokenizer, row)
        odd, even = (ids + answer_ids(engine.tokenizer, row, c) for c in row["completions"][:2])
        worse, better = engine.logprobs([odd, even])
        gaps.append(float(better[len(ids) - 1 :].sum() - worse[len(ids) - 1 :].sum()))
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize("name, group", [
    ("model.layers.2.self_attn.v_proj.weight", "layers.2.self_attn"), ("model.embed_tokens.weight", "embed_tokens"),
])  # fmt: skip
def test_a_corrupted_weight_stops_the_run_within_one_step(speaker, prompts, tmp_path, name, group, monkeypatch):
    """One number of one tensor, on the way to the engine after the first update."""
    from stages.rollout.engines.transformers import Engine

    sync, syncs = Engine.sync_weights, []

    def corrupting(self, state):
        syncs.append(1)
        if len(syncs) == 2:
            state = state | {name: state[name].clone()}
            state[name].view(-1)[5] += 1e-3
        sync(self, state)

    monkeypatch.setattr(Engine, "sync_weights", corrupting)
    with pytest.raises(CuveeError, match=f"the tensor group {group} differs most \\(by 0.001\\)"):
        run("train.rl", {**RL, "steps": 4}, tmp_path / "out", init=speaker, prompts=prompts)
    lines = (tmp_path / "out-scratch" / "metrics.jsonl").read_text().splitlines()
    assert max(p["step"] for p in map(json.loads, lines) if "loss" in p) == 1


def test_completions_that_count_by_themselves_need_no_contrast(speaker, prompts, tmp_path):
    """One of each prompt, some right and some wrong: nothing to copg, something to learn from to KTO."""
    values = {**RL, "steps": 2, "completions": 1, "objective": "kto", "options": {}}
    metrics = run("train.rl", values, tmp_path / "out", init=speaker, prompts=prompts)
    assert metrics["contrast"] == 0 and metrics["grad_norm"] > 0
    with pytest.raises(ConfigError, match="completions: 1 contrasts nothing; give at least 2"):
        run("train.rl", values | {"objective": "copg"}, tmp_path / "copg", init=speaker, prompts=prompts)


def test_off_policy_rollouts_are_one_block_older(speaker, prompts, tmp_path):
    values = {**RL, "steps": 7, "rollout_every": 2, "off_policy": True, "objective": "grpo", "lr": 0.006}
    metrics = run("train.rl", values, tmp_path / "out", init=speaker, prompts=prompts)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert [(r["block"], r["version"]) for r in rows[:: 2 * 8]] == [(0, 0), (1, 0), (2, 2), (3, 4)]
    points = [json.loads(line) for line in (tmp_path / "out-scratch" / "metrics.jsonl").read_text().splitlines()]
    stale = [p["rollout/staleness"] for p in points if "rollout/staleness" in p]
    assert stale == [0, 1, 2, 3, 2, 3, 2] and metrics["kl_sampler"] > 1e-6
    shares = {k: v for k, v in metrics.items() if k.startswith("share/")}
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
    table = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert len({len(column) for column in table.values()}) == 1 and table["reward"][0] == table["reward/verifier"][0]


PPO = {"objective": "ppo", "options": {"value_steps": 2}, "rollout_every": 1}


@pytest.mark.parametrize("changes", [
    {"rollout_every": 1}, {"rollout_every": 3}, {"rollout_every": 0}, {"rollout_every": 1, "off_policy": True},
    {"rollout_every": 3, "off_policy": True}, PPO, PPO | {"rollout_every": 3}, PPO | {"distributed_optimizer": True},
    PPO | {"fsdp": True},
])  # fmt: skip
def test_rl_resumes_bit_for_bit(speaker, prompts, tmp_path, changes, monkeypatch):
    """Killed after the rollouts of a block (PPO: after the value network's step), before the next checkpoint; then again
    before any rollout."""
    stream = Criticised if "objective" in changes else Rollouts
    values = {**RL, "steps": 7, "save_every": 2, **changes}
    run("train.rl", values, tmp_path / "whole", init=speaker, prompts=prompts)
    for at in (3, 5):
        killed_at(monkeypatch, stream, at, "train.rl", values, tmp_path / "parts", init=speaker, prompts=prompts)
    run("train.rl", values, tmp_path / "parts", init=speaker, prompts=prompts)
    for name in ("model.safetensors", "rollouts.jsonl", "samples.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_no_prompt_is_twice_in_a_step(speaker, prompts, tmp_path, monkeypatch):
    """Of 8 prompts a step those remain whose completions are rewarded differently."""
    batch, seen = Rollouts.batch, []

    def noted(self, step, trainer):
        found = batch(self, step, trainer)
        seen.append((len(found), len(self.groups), len({id(group) for group in found})))
        return found

    monkeypatch.setattr(Rollouts, "batch", noted)
    run("train.rl", {**RL, "steps": 4, "min_gap": 0.1}, tmp_path / "out", init=speaker, prompts=prompts)
    assert all(count == there == distinct for count, there, distinct in seen) and {n for n, _, _ in seen} - {0, 8}


def test_a_run_that_makes_even_the_best_unlikely_says_so(speaker, prompts, tmp_path, capsys):
    """Offline on few prompts with large steps: all that was sampled loses its probability to what was never judged."""
    values = {**RL, "steps": 16, "rollout_every": 0, "rollout_prompts": 16, "options": {"beta": 2.0}}
    for lr, warned in ((0.0, False), (0.02, True)):
        values["lr"] = lr
        metrics = run("train.rl", values, tmp_path / f"{lr}", init=speaker, prompts=prompts)
        told = "even the best completions are" in capsys.readouterr().out
        assert told == warned == (metrics["best_ratio"] < -0.2), metrics


def test_rollouts_that_are_all_rewarded_alike_teach_nothing(speaker, prompts, tmp_path):
    values = {**RL, "steps": 2, "max_new_tokens": 1, "rewards": {"overlong": 1.0}}
    with pytest.raises(CuveeError, match="nothing was learned"):
        run("train.rl", values, tmp_path / "out", init=speaker, prompts=prompts)


@pytest.mark.parametrize("changes, words", [
    ({"temperature": -1.0}, "temperature: -1 is negative"),
    ({"temperature": 0.0}, "temperature: 0 samples the same completion"),
    ({"completions": 0, "with_answer": True}, "completions: 0"),
    ({"max_new_tokens": 128}, "max_new_tokens: 128 leave no room for a prompt in sequence_length 128"),
    ({"objective": "ppo", "context_parallel": 2}, "context_parallel: 2, under which objective ppo"),
    ({"engine": "openai"}, "engine_options.url: '' is no address"),
    ({"engine": "openai", "engine_options": {"url": "http://x/v1", "concurrency": 0}}, "concurrency is 0"),
])  # fmt: skip
def test_rl_that_cannot_work_is_refused(speaker, prompts, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        run("train.rl", RL | changes, tmp_path / "out", init=speaker, prompts=prompts)
    assert not (tmp_path / "out").exists()
