"""Every objective of the registry through the trainer and the stages: a new file is tested by being there."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from post_helpers import COMMON, RL, Fixed, accuracy, artifact, run
from tiny import jsonl

from stages.stage import CuveeError, Kind, names, resolve
from stages.train._groups import Grouper, needs_values, prepared
from stages.trainer.batch import Group

NAMES = names("objectives")
OFFLINE = [n for n in NAMES if not needs_values(resolve("objectives", n))]
STAGED = [n for n in NAMES if resolve("objectives", n).GROUP != "single" and not resolve("objectives", n).NEEDS_SCORES]
RATIOS = [n for n in STAGED if resolve("objectives", n).NEEDS_BEHAVIOUR]


def batch(folder, module) -> list[Group]:
    """Groups of the objective's kind: eight prompts with three completions of uneven lengths."""
    from transformers import AutoTokenizer

    rng = random.Random(0)
    grouper = Grouper(AutoTokenizer.from_pretrained(folder), module.GROUP, 256, behaviour=module.NEEDS_BEHAVIOUR)
    found = []
    for i in range(8):
        completions = [str(rng.randrange(10 ** (4 * j + 1))) for j in range(3)]
        tokens = [[*grouper.tokenizer.encode(c, add_special_tokens=False), grouper.tokenizer.eos_token_id] for c in completions]
        row = {
            "id": str(i), "messages": [{"role": "user", "content": "7" * rng.randrange(1, 20)}], "completions": completions,
            "tokens": tokens, "logprobs": [[-rng.random() - 5 for _ in t] for t in tokens],
            "rewards": [rng.random() - 0.5 for _ in completions],
        }  # fmt: skip
        found += grouper(row)
    if module.__name__.endswith("distill"):
        like = lambda s: np.random.default_rng(len(s.tokens)).random((len(s.tokens), 3), np.float32)  # noqa: E731
        found = [[replace(s, teacher=((like(s) * 250).astype(np.int32), -9 * like(s))) for s in g] for g in found]
    if needs_values(module):
        drawn = lambda s: np.random.default_rng(len(s.tokens)).normal(size=len(s.tokens)).astype(np.float32)  # noqa: E731
        found = [[replace(s, token_fields={"advantage": drawn(s)}) for s in g] for g in found]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_step_does_not_depend_on_microbatches(name, start):
    """Two optimizer steps in one microbatch and in many: the same loss, metrics and weights, and the weights move."""
    from stages.model.folder import read_config
    from stages.trainer.config import TrainConfig
    from stages.trainer.trainer import Trainer

    module = resolve("objectives", name)
    groups = batch(start.path, module)
    found = []
    for budget in (100_000, 1):
        trainer = Trainer(
            TrainConfig(steps=2, micro_batch_tokens=budget, weight_decay=0.0), read_config(start.path),
            lambda packed: module.loss(packed, module.Config()), start.path, "reward" if module.NEEDS_SCORES else "lm",
            start.path if module.NEEDS_REFERENCE else None,
        )  # fmt: skip
        before = trainer.hf_state()
        stream = prepared(module, Fixed(groups))
        metrics = [trainer.step(stream.batch(step, trainer), 1e-3) for step in range(2)]
        found.append((metrics, trainer.hf_state()))
    (whole, weights), (parts, others) = found
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6) and a["skipped"] == 0 and a["grad_norm"] > 0
    for key, weight in weights.items():
        torch.testing.assert_close(weight, others[key], rtol=0, atol=2e-5)
    assert any(not torch.equal(weights[key], before[key]) for key in before)


@pytest.mark.parametrize("name", STAGED)
def test_trains_by_its_name_online(name, speaker, prompts, tmp_path):
    """In train.rl; on the policy's own samples the ratios are 1, which takes the sampler's log-probabilities, saved and
    laid out target by target."""
    values = {**RL, "steps": 2, "objective": name, "options": {}}
    metrics = run("train.rl", values, tmp_path / "out", init=speaker, prompts=prompts)
    assert np.isfinite(list(metrics.values())).all() and metrics["skipped"] == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert [row["version"] for row in rows] == [0] * 8 + [1] * 8
    assert all(len(t) == len(p) for row in rows for t, p in zip(row["tokens"], row["logprobs"], strict=True))
    assert all(p <= 0 for row in rows for nats in row["logprobs"] for p in nats)
    if name in RATIOS:
        assert abs(metrics["kl_sampler"]) < 1e-9 and metrics.get("clipped", 0) == 0


@pytest.mark.parametrize("name", [n for n in STAGED if n in OFFLINE])
def test_trains_by_its_name_offline(name, speaker, prompts, tmp_path):
    values = {"prompts": 8, "completions": 3, "max_new_tokens": 4, "sequence_length": 128}
    run("rollout.sample", values, tmp_path / "pairs", policy=speaker, prompts=prompts)
    pairs = artifact(tmp_path / "pairs", Kind.PAIRS)
    values = {**COMMON, "steps": 2, "batch_groups": 4, "lr": 1e-3, "objective": name}
    metrics = run("train.preference", values, tmp_path / "out", init=speaker, pairs=pairs)
    assert np.isfinite(list(metrics.values())).all() and metrics["skipped"] == 0


@pytest.mark.parametrize("name, changes", [
    ("copg", {"steps": 16}), ("copg", {"rollout_every": 4}), ("copg", {"rollout_every": 0}),
    *((name, {"rollout_every": 2, "lr": 0.006}) for name in RATIOS),
])  # fmt: skip
def test_online_objectives_raise_the_reward(name, changes, speaker, prompts, tmp_path):
    """Of ten digits one is right. A rollout lasts some steps, so that all but the first are off-policy; CoPG offline too."""
    options = {"dapo": {}, "mdloo": {"beta": 0.02, "gamma": 0.05}, "ppo": {"beta": 0.02, "value_steps": 4}}
    values = {**RL, "steps": 24, "objective": name, "options": options.get(name, {"beta": 0.02}), **changes}
    metrics = run("train.rl", values, tmp_path / "out", init=speaker, prompts=prompts)
    assert list(metrics)[:2] == ["reward_first", "reward_last"]
    assert metrics["reward_first"] < 0.3 and metrics.get("kl", 0.0) >= 0
    if values.get("rollout_every", 1):
        assert metrics["reward_last"] > metrics["reward_first"] + 0.1
    else:  # what the start sampled is less likely now on the whole: minus KL(start || policy)
        assert metrics["log_ratio"] < 0 < metrics["kl"]
    assert accuracy(tmp_path / "out", prompts["math"]) > 0.9


def test_completions_without_their_sampling_are_refused(speaker, tmp_path):
    rows = [{"id": "a", "domain": "math", "messages": [{"role": "user", "content": "1"}], "completions": ["1", "2"],
             "rewards": [0.0, 1.0]}]  # fmt: skip
    values = {**COMMON, "steps": 1, "batch_groups": 1, "objective": "grpo"}
    for more in ({}, {"tokens": [[30], [31]], "logprobs": [[-1.0], None]}):
        jsonl(tmp_path / "pairs" / "samples.jsonl", [rows[0] | more])
        with pytest.raises(CuveeError, match="a: a completion has no log-probabilities of its sampling"):
            run("train.preference", values, tmp_path / "out", init=speaker, pairs=artifact(tmp_path / "pairs", Kind.PAIRS))


def test_a_reward_models_objective_is_refused(speaker, tmp_path):
    with pytest.raises(CuveeError, match="objective: bradley_terry .* train.reward"):
        run("train.preference", {**COMMON, "objective": "bradley_terry"}, tmp_path / "out", init=speaker, pairs=None)


def test_overlong_rewards_tokens(speaker, prompts, tmp_path):
    """Through the sampler: -1 for what was cut off at max_new_tokens."""
    values = {"prompts": 4, "completions": 2, "max_new_tokens": 1, "sequence_length": 128, "rewards": {"overlong": 0.5}}
    run("rollout.sample", values, tmp_path / "pairs", policy=speaker, prompts=prompts)
    rows = [json.loads(line) for line in (tmp_path / "pairs" / "samples.jsonl").read_text().splitlines()]
    assert all(row["parts"]["overlong"] == pytest.approx([-1.0] * 2) for row in rows)
    assert all(row["rewards"] == pytest.approx([-0.5] * 2) for row in rows)


def test_log_probabilities_are_the_sequences_own_beside_a_teacher(start):
    from stages.model.folder import read_config
    from stages.trainer.config import TrainConfig
    from stages.trainer.trainer import Trainer

    taught = batch(start.path, resolve("objectives", "distill"))
    trainer = Trainer(TrainConfig(steps=1), read_config(start.path), lambda packed: None, start.path)
    found = trainer.logprobs(taught)
    for a, b in zip(found, trainer.logprobs([[replace(s, teacher=None) for s in g] for g in taught]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    beyond = [[replace(s, teacher=(s.teacher[0] + 320, s.teacher[1])) for s in g] for g in taught]
    with pytest.raises(CuveeError, match="outside the model's vocabulary of 320 rows"):
        trainer.logprobs(beyond)


SFT = {**COMMON, "batch_groups": 8, "teacher_weight": 1.0}


def test_distillation_is_the_forward_kl(start, speaker, prompts, tmp_path):
    """With all of the vocabulary, the first step's loss is KL(teacher || student) as transformers computes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stages.chat.render import render
    from stages.rollout._collect import schedule

    tokenizer = AutoTokenizer.from_pretrained(start.path)
    values = {**SFT, "steps": 1, "lr": 0.0, "teacher_top_k": 1000}
    metrics = run("train.sft", values, tmp_path / "out", init=start, prompts=prompts, teacher=speaker)
    rows = [json.loads(line) for line in (prompts["math"].path / "train.jsonl").read_text().splitlines()]
    models = [AutoModelForCausalLM.from_pretrained(m.path) for m in (speaker, start)]
    total = count = 0.0
    for _, i in schedule({"math": len(rows)}, {}, 8, 0):
        text = render(tokenizer, [*rows[i]["messages"], {"role": "assistant", "content": rows[i]["answer"]}])
        with torch.inference_mode():
            teacher, student = (m(torch.tensor([text.ids])).logits[0, :-1].double() for m in models)
        teacher, student = teacher[:, : len(tokenizer)].log_softmax(-1), student.log_softmax(-1)[:, : len(tokenizer)]
        mask = torch.tensor(text.mask[1:], dtype=torch.float64)
        total += float(((teacher.exp() * (teacher - student)).sum(-1) * mask).sum())
        count += float(mask.sum())
    assert metrics["loss"] == pytest.approx(metrics["kl"]) == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("k, weight", [(8, 1.0), (1, 0.9)])
def test_a_student_learns_what_its_teacher_says(start, speaker, prompts, tmp_path, k, weight):
    values = {**SFT, "steps": 40, "lr": 0.01, "teacher_top_k": k, "teacher_weight": weight}
    metrics = run("train.sft", values, tmp_path / "out", init=start, prompts=prompts, teacher=speaker)
    assert metrics["loss"] < 0.4 * metrics["loss_first"]
    assert metrics["kl"] < 0.3 if k > 1 else metrics["kl"] > 0


def test_a_teacher_with_another_tokenizer_is_refused(start, speaker, prompts, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(speaker.path, other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    with pytest.raises(CuveeError, match="teacher: .* another tokenizer"):
        teacher = artifact(other, Kind.CHECKPOINT)
        run("train.sft", {**SFT, "steps": 1}, tmp_path / "out", init=start, prompts=prompts, teacher=teacher)
