"""The policy-gradient objectives and KTO: golden values, clipping, optima in closed form, what they refuse."""

import math

import numpy as np
import pytest
import torch
from test_objectives import example, pack, value

from stages import stage
from stages.objectives import kto
from stages.objectives._policy import k3
from stages.stage import ConfigError, load, parse
from stages.train._groups import Prepared, make_sequence, prepared

RATIOS = ["dapo", "grpo", "mdloo", "rloo"]


def gradient(name, group, dtype=torch.float64, **options):
    """Of the loss by each log-probability of one group, and the metrics' means."""
    objective = stage.resolve("objectives", name)
    batch, leaf = pack([group], objective, dtype)
    found = objective.loss(batch, objective.Config(**options))
    (found.sum / found.count).backward()
    pairs = {k: v if isinstance(v, tuple) else (v, found.count) for k, v in found.metrics.items()}
    return leaf.grad.tolist(), {k: float(total / count) for k, (total, count) in pairs.items()}


def on_policy(*rewards, old=-1.0, ratio=1.0):
    return [{"logp": [old + math.log(ratio)], "ref": [old], "old": [old], "reward": r} for r in rewards]


@pytest.mark.parametrize(
    "name, advantage", [("grpo", 0.865875), ("dapo", 0.865875), ("rloo", 0.666667), ("mdloo", 0.666667)]
)
def test_golden_advantages(name, advantage):
    """On-policy the gradient is minus the advantage of each completion, here of rewards 1, 0, 0, 1, over k."""
    found, _ = gradient(name, on_policy(1.0, 0.0, 0.0, 1.0))
    assert [-4 * x for x in found] == pytest.approx([advantage, -advantage, -advantage, advantage], abs=1e-6)


def test_golden_k3():
    assert float(k3(torch.tensor(0.2, dtype=torch.float64))) == pytest.approx(0.0214028, abs=5e-8)
    assert value("grpo", [[{"logp": [-1.2], "ref": [-1.0], "old": [-1.2], "reward": 0.0}] * 2], beta=1.0) == (
        pytest.approx(0.0214028, rel=1e-4)
    )


def test_on_policy_rloo_is_copg():
    """CoPG's rescaled gradient is minus the leave-one-out advantage with the KL in the reward, summed over completions."""
    group = example("rloo", np.random.default_rng(0), 1)[0]
    for sequence in group:
        sequence["old"] = sequence["logp"]
    ours, _ = gradient("rloo", group, beta=0.06)
    assert [len(group) * x for x in ours] == pytest.approx(gradient("copg", group, beta=0.06)[0])


@pytest.mark.parametrize(
    "name, ratio, up, down",  # whether a completion with a positive, a negative advantage still has a gradient
    [
        ("grpo", 1.15, True, True), ("grpo", 1.25, False, True), ("grpo", 0.75, True, False),
        ("dapo", 1.25, True, True), ("dapo", 1.3, False, True), ("dapo", 0.75, True, False),
        ("rloo", 1.25, False, True), ("rloo", 0.75, True, False),
        ("mdloo", 1.3, True, True), ("mdloo", 0.7, True, True),
    ],
)  # fmt: skip
def test_clipping(name, ratio, up, down):
    options = {"grpo": {"beta": 0.0}, "rloo": {"beta": 0.0}, "mdloo": {"beta": 0.0, "gamma": 0.0}}.get(name, {})
    found, metrics = gradient(name, on_policy(1.0, 0.0, ratio=ratio), **options)
    assert [x != 0 for x in found] == [up, down]
    assert found[0] <= 0 <= found[1]
    assert metrics["kl_sampler"] == pytest.approx(ratio - 1 - math.log(ratio))
    assert metrics.get("clipped", 0.0) == (not up) / 2 + (not down) / 2


@pytest.mark.parametrize("name", ["dapo", "grpo", "rloo"])
@pytest.mark.parametrize("rewards", [(0.1, 0.1, 0.1), (1.0, 1.0, 1.0), (-0.7, -0.7, -0.7)])
def test_equal_rewards_give_no_gradient(name, rewards):
    found, _ = gradient(name, on_policy(*rewards, ratio=1.0))
    assert found == pytest.approx([0.0] * 3, abs=1e-11)


def test_a_long_completion_weighs_by_its_tokens_in_dapo_and_as_any_other_in_grpo():
    group = on_policy(1.0, 0.0)
    group[1] |= {key: group[1][key] * 3 for key in ("logp", "ref", "old")}
    a = (0.5 / (math.sqrt(0.5) + 1e-4),) * 2
    assert gradient("dapo", group)[0] == pytest.approx([-a[0] / 4, a[1] / 4, a[1] / 4, a[1] / 4])
    assert gradient("grpo", group)[0] == pytest.approx([-a[0] / 2, a[1] / 6, a[1] / 6, a[1] / 6])


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_far_from_the_sampling_policy_nothing_overflows(name, gap):
    group = [{"logp": [-1.0], "ref": [-1.0], "old": [-1.0 - gap], "reward": r} for r in (1.0, 0.5, 0.0)]
    found, metrics = gradient(name, group, torch.float32, **({} if name == "dapo" else {"beta": 0.001}))
    assert np.isfinite(found).all() and np.isfinite(list(metrics.values())).all()


def bandit_gradient(name, logits, rewards, counts, **options):
    """Gradient by the logits of a softmax policy over arms on one group that holds each arm `counts` times, just as often
    as the sampling policy would draw it."""
    objective = stage.resolve("objectives", name)
    chosen = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    old = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    nats = old.log().tolist()
    group = [{"logp": [0.0], "ref": [nats[a]], "old": [nats[a]], "reward": rewards[a]} for a in chosen]
    batch, _ = pack([group], objective, torch.float64)
    logits = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    batch.logprobs = logits.log_softmax(0)[chosen]
    found = objective.loss(batch, objective.Config(**options))
    (found.sum / found.count).backward()
    return logits.grad, found


def test_mdloo_is_mirror_descent():
    """Its minimum is pi_k exp(A/gamma)/Z, and its second term is KL(pi || pi_k), both exact where the sample is pi_k."""
    rewards, counts, gamma = (2.5, 2.0, 1.0), (4, 2, 2), 0.7
    old = np.array(counts) / sum(counts)
    mean = (np.array(rewards) * counts).sum() / 8
    advantage = 8 / 7 * (np.array(rewards) - mean)
    best = old * np.exp(advantage / gamma)
    best /= best.sum()
    grad, found = bandit_gradient("mdloo", np.log(best), rewards, counts, gamma=gamma, beta=0.0)
    assert float(grad.abs().max()) < 1e-12
    divergence = float(found.metrics["divergence"][0] / found.metrics["divergence"][1])
    assert divergence == pytest.approx(float((best * np.log(best / old)).sum()))
    off, _ = bandit_gradient("mdloo", np.log(old), rewards, counts, gamma=gamma, beta=0.0)
    assert float(off.abs().max()) > 0.1


@pytest.mark.parametrize("name", ["rloo", "copg", "mdloo"])
def test_the_optimum_is_where_reward_and_pull_cancel(name):
    """At pi = pi_old = ref exp(r / beta) / Z every advantage is 0."""
    objective, beta, rewards = stage.resolve("objectives", name), 0.5, np.array([2.5, 2.0, 1.0])
    best = np.exp(rewards / beta) / np.exp(rewards / beta).sum()
    group = [{"logp": [p], "old": [p], "ref": [math.log(1 / 3)], "reward": r}
             for p, r in zip(np.log(best), rewards, strict=True)]  # fmt: skip
    assert gradient(name, group, beta=beta)[0] == pytest.approx([0.0] * 3, abs=1e-12)
    group[0]["reward"] += 0.1
    assert min(gradient(name, group, beta=beta)[0]) < -0.02
    assert objective.NEEDS_REFERENCE


class Scores:
    """A trainer whose log-probabilities are those of a bigram table, its reference's of another."""

    def __init__(self):
        self.tables = np.random.default_rng(0).normal(size=(2, 30, 30)) - 3

    def _of(self, table, groups):
        return [np.where(s.mask[1:] > 0, table[s.tokens[:-1], s.tokens[1:]], 0.0) for g in groups for s in g]

    def logprobs(self, groups):
        return self._of(self.tables[0], groups)

    def reference_logprobs(self, groups):
        return self._of(self.tables[1], groups)


@pytest.mark.parametrize("name", ["copg", "grpo", "rloo", "mdloo"])
def test_kl_is_that_of_the_policy_to_the_reference_whoever_sampled(name):
    """Exact where arms come as often as the sampler draws them, be it the policy, the reference or a third one; log_ratio
    is of either sign."""
    policy, reference = np.array([0.25, 0.625, 0.125]), np.array([0.5, 0.25, 0.25])
    expected = (policy * np.log(policy / reference)).sum()
    for counts in ((2, 5, 1), (4, 2, 2), (1, 1, 6)):
        old = np.log(np.array(counts) / 8)
        group = [{"logp": [math.log(policy[a])], "ref": [math.log(reference[a])], "old": [old[a]], "reward": float(a)}
                 for a in np.repeat(range(3), counts)]  # fmt: skip
        objective = stage.resolve("objectives", name)
        batch, _ = pack([group], objective, torch.float64)
        batch.behaviour = torch.tensor([s["old"][0] for s in group], dtype=torch.float64)  # CoPG does without, but has it
        found = objective.loss(batch, objective.Config()).metrics
        metrics = {key: float(found[key][0] / found[key][1]) for key in ("kl", "log_ratio")}
        assert metrics["kl"] == pytest.approx(expected, rel=1e-9)
        assert metrics["log_ratio"] == pytest.approx((np.array(counts) / 8 * np.log(policy / reference)).sum())


def test_kto_baseline_is_the_mean_ratio_of_mismatched_pairs():
    groups = [[make_sequence([i, 9], [10 + 3 * i + j, 20 + i], reward=j) for j in range(2)] for i in range(3)]
    assert [s.tokens.tolist() for (s,) in kto.mismatched(groups)[:3]] == [[0, 9, 13, 21], [0, 9, 14, 21], [1, 9, 16, 22]]
    trainer = Scores()
    gap = trainer.tables[0] - trainer.tables[1]
    expected = np.mean([gap[9, 10 + 3 * i + j] + gap[10 + 3 * i + j, 20 + i] for i in range(3) for j in range(2)])
    if expected < 0:
        trainer.tables, expected = trainer.tables[::-1], -expected
    (found,) = {s.fields["baseline"] for g in kto.prepare(groups, trainer) for s in g}
    assert found == pytest.approx(expected) and expected > 0.01
    trainer.tables = trainer.tables[::-1]
    assert {s.fields["baseline"] for g in kto.prepare(groups, trainer) for s in g} == {0.0}, "never negative"
    assert {s.fields["baseline"] for g in kto.prepare(groups[:1], trainer) for s in g} == {0.0}
    assert "baseline" not in groups[0][0].fields


def test_kto_mismatched_pairs_are_no_longer_than_the_longest_sequence():
    groups = [[make_sequence([1] * 5, [2])], [make_sequence([3], [4] * 4)]]
    assert [s.tokens.tolist() for (s,) in kto.mismatched(groups)] == [[1, 1, 1, 1, 1, 4], [3, 2]]


@pytest.mark.parametrize(
    "good, h, z, expected",
    [(1, 0.5, 0.0, 0.4875026), (1, 0.0, 0.5, 0.5124974), (0, 0.5, 0.0, 0.5124974), (0, 0.5, 0.5, 0.5)],
)
def test_kto_values(good, h, z, expected):
    """1 - sigmoid(.05) = .4875026 and so on, beta .1."""
    group = [{"logp": [h], "ref": [0.0], "reward": float(good), "baseline": z}]
    assert value("kto", [group]) == pytest.approx(expected, rel=1e-6)
    assert value("kto", [group], desirable_weight=2.0, undesirable_weight=3.0) == pytest.approx(
        expected * (2 if good else 3), rel=1e-6
    )


def test_slic_values():
    """delta 1, gap .37: hinge .63; beyond the margin the likelihood of the preferred one alone is raised."""
    pair = lambda w, low: [{"logp": [w], "chosen": 1.0}, {"logp": [low], "chosen": 0.0}]  # noqa: E731
    assert value("slic", [pair(-2.0, -2.37)], regularisation=0.0) == pytest.approx(0.63)
    assert value("slic", [pair(-2.0, -2.37)], regularisation=0.5) == pytest.approx(1.63)
    assert gradient("slic", pair(-2.0, -4.0), regularisation=0.5)[0] == [-0.5, 0.0]


def test_only_an_objective_that_prepares_changes_the_stream():
    stream = type("Stream", (), {"batch": lambda self, step, trainer: ["group"] * step})()
    assert prepared(stage.resolve("objectives", "dpo"), stream) is stream
    wrapped = Prepared(stream, lambda groups, trainer: [*groups, trainer])
    assert wrapped.batch(2, "t") == ["group", "group", "t"] and wrapped.batch(0, "t") == []


@pytest.mark.parametrize(
    "values, message",
    [
        ({"objective": "dapo", "options": {"clip_high": -0.1}}, "options.clip_high: -0.1 is out of range; give 0 or more"),
        ({"objective": "mdloo", "options": {"gamma": -1.0}}, "options.gamma: -1.0 is out of range"),
        ({"objective": "dapo", "sft_weight": 0.2}, "sft_weight: 0.2 .* a mean over tokens"),
        ({"objective": "kto", "sft_weight": 0.2}, "sft_weight: 0.2 .* a mean over sequences"),
        ({"objective": "grpo", "with_answer": True}, "objective: grpo .* with_answer=false temperature=1"),
        ({"objective": "dapo", "temperature": 0.7}, r"objective: dapo .* \(temperature 0.7\)"),
    ],
)
def test_refuses(values, message):
    module = load("train.rl")
    with pytest.raises(ConfigError, match=message):
        module.check(parse(module.Config, values, "train.rl"), {"prompts": {}})
