"""PPO: advantages and the value loss by hand, the value network in training and refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from post_helpers import COMMON, RL, run

from stages.model.folder import read_config
from stages.objectives import ppo
from stages.stage import ConfigError, Context, CuveeError
from stages.train._critic import Critic, Criticised
from stages.train._groups import make_sequence
from stages.trainer.batch import Packed
from stages.trainer.config import TrainConfig


def test_generalised_advantages_by_hand():
    """delta = (-.1, -.1, .7); A3 = .7, A2 = -.1 + .95 * .7 = .565, A1 = -.1 + .95 * .565 = .43675."""
    rewards, values = np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.4, 0.3])
    advantage, aim = ppo.estimate(rewards, values, ppo.Config())
    assert advantage == pytest.approx([0.43675, 0.565, 0.7]) and aim == pytest.approx([0.93675, 0.965, 1.0])
    advantage, _ = ppo.estimate(rewards, values, ppo.Config(lam=0.0, gamma=0.9))
    assert advantage == pytest.approx([0.9 * 0.4 - 0.5, 0.9 * 0.3 - 0.4, 0.7])
    advantage, _ = ppo.estimate(rewards, values, ppo.Config(lam=1.0))
    assert advantage == pytest.approx(rewards.sum() - values)
    white = np.concatenate(ppo.whitened([np.array([1.0, 2.0]), np.array([6.0])]))
    assert white == pytest.approx(np.array([-2.0, -1.0, 3.0]) / np.sqrt(7.0)) and white.std(ddof=1) == pytest.approx(1)


def test_the_value_loss_by_hand_and_its_gradient():
    """v moves .5 from V = 0, .2 is free: of R = 1 the clipped error .64 counts, without a gradient; of R = .3 both are."""
    values = torch.tensor([0.5, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    fields = {"value": torch.zeros(3).double(), "return": torch.tensor([1.0, 0.3, 1.0]).double()}
    one = torch.ones(3).double()
    batch = Packed(one, one, torch.zeros(3).long(), torch.zeros(1).long(), {}, values=values, token_fields=fields)
    loss = ppo.value_loss(batch, ppo.Config())
    assert float(loss.sum) == pytest.approx((0.64 + 0.04 + 0.81) / 2) and float(loss.count) == 3
    assert float(loss.metrics["value_clipped"]) == 1
    loss.sum.backward()
    assert values.grad.tolist() == pytest.approx([0.0, 0.2, -0.9])


def sequences():
    rng = np.random.default_rng(0)
    made = []
    for i in range(6):
        prompt, answer = rng.integers(20, 270, 3 + i).tolist(), rng.integers(20, 270, 1 + i).tolist()
        made.append([make_sequence(prompt, answer, (-rng.random(len(answer))).tolist(), reward=float(rng.normal()))])
    return made


class Blocks:
    """The same groups in every step; a block has `steps` of them."""

    def __init__(self, groups: list, steps: int = 1):
        self.groups, self.steps = [[group] for group in groups], steps

    def batch(self, step: int, trainer) -> list:
        self.current = step // self.steps
        return [group for found in self.groups for group in found]


def trainers(folder, **fields):
    from stages.trainer.trainer import Trainer

    config = TrainConfig(steps=4, weight_decay=0.0, lr=1e-3, schedule="constant", **fields)
    critic, sizes = Critic(folder, ppo, ppo.Config(beta=0.1)), read_config(folder)
    trainer = Trainer(config, sizes, lambda b: ppo.loss(b, critic.options), folder, reference=folder)
    trainer.critic = Trainer(config, sizes, critic.objective, folder, "value")
    return trainer, critic, config


def test_tokens_get_their_advantages_from_values_and_rewards(start, tmp_path):
    """Against loops over transformers' hidden states, and whatever the microbatches."""
    from transformers import AutoModelForCausalLM

    found = []
    for budget in (100_000, 1):
        trainer, critic, config = trainers(start.path, micro_batch_tokens=budget)
        score = trainer.critic.hf_state()["score.weight"][0]
        groups = Criticised(Blocks(sequences()), critic, config, Context(tmp_path / str(budget))).batch(0, trainer)
        found.append((groups, trainer.step(groups, 1e-3), trainer.critic.hf_state()))
    model = AutoModelForCausalLM.from_pretrained(start.path)
    raw = []
    for (s,) in found[0][0]:
        ids = torch.from_numpy(s.tokens.astype("int64"))[None]
        with torch.inference_mode():
            hidden = model.model(ids).last_hidden_state[0]
            reference = model.lm_head(hidden).mul(model.logit_scale).log_softmax(-1)
        at = np.flatnonzero(s.mask)
        value = (hidden[at - 1] @ score).numpy()
        assert s.token_fields["value"][at] == pytest.approx(value, abs=1e-5)
        reward = [-0.1 * (float(s.behaviour[t]) - float(reference[t - 1, s.tokens[t]])) for t in at]
        reward[-1] += s.fields["reward"]
        later, own = 0.0, []
        for t in reversed(range(len(at))):
            later = reward[t] + (value[t + 1] if t + 1 < len(at) else 0.0) - value[t] + 0.95 * later
            own.append(later)
        raw.append(own[::-1])
        assert s.token_fields["return"][at] == pytest.approx(np.array(own[::-1]) + value, abs=1e-4)
    every = np.concatenate(raw)
    for (s,), own in zip(found[0][0], raw, strict=True):
        expected = (np.array(own) - every.mean()) / every.std(ddof=1)
        assert s.token_fields["advantage"][s.mask > 0] == pytest.approx(expected, abs=1e-4)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4, abs=1e-6)
    for name, weight in found[0][2].items():
        torch.testing.assert_close(weight, found[1][2][name], rtol=0, atol=2e-4)  # of a step of 5e-3


def test_the_value_network_learns_the_returns(start, tmp_path):
    trainer, critic, config = trainers(start.path)
    critic.options = replace(critic.options, value_clip=10.0, value_lr=5.0)
    stream = Criticised(Blocks(sequences()), critic, replace(config, steps=40), Context(tmp_path))
    for step in range(40):
        stream.batch(step, trainer)
    points = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert points[-1]["value/loss"] < 0.2 * points[0]["value/loss"] and points[-1]["value/explained"] > 0.8


def test_values_are_those_of_the_blocks_beginning(start, tmp_path):
    """So that clipping has something to clip, and whoever resumes within the block goes on with the same ones."""
    trainer, critic, config = trainers(start.path)
    critic.options = replace(critic.options, value_clip=0.01, value_lr=50.0)
    stream, given = Criticised(Blocks(sequences(), steps=3), critic, config, Context(tmp_path)), []
    given = [stream.batch(step, trainer) for step in range(3)]
    taken = [[s.token_fields["value"] for (s,) in groups] for groups in given]
    moved = trainer.critic.values(sequences())
    again = Criticised(Blocks(sequences(), steps=3), critic, config, Context(tmp_path)).batch(2, trainer)
    for first, second, last, now, (one,) in zip(*taken, moved, again, strict=True):
        assert (first == second).all() and (first == last).all() and (first == one.token_fields["value"]).all()
        at = np.flatnonzero(one.mask)
        assert first[at] != pytest.approx(now[at - 1], abs=1e-3), "the network has moved"
    points = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert points[0]["value/value_clipped"] == 0 and points[2]["value/value_clipped"] > 0


def test_a_block_sampled_anew_has_values_of_its_own(start, tmp_path):
    """By another host, say, after which the run comes back to this one."""
    trainer, critic, config = trainers(start.path)
    anew = [[replace(s, tokens=np.roll(s.tokens, 1)) for s in group] for group in sequences()]
    for groups in (sequences(), anew, sequences()):
        Criticised(Blocks(groups), critic, config, Context(tmp_path)).batch(0, trainer)
    assert len(list((tmp_path / "rollouts").glob("block-000000-*.npz"))) == 2


def test_a_value_network_that_learns_nothing_ends_the_run(start, tmp_path):
    trainer, critic, config = trainers(start.path, max_skipped=2)
    wrong = [[replace(s, fields=s.fields | {"reward": math.nan}) for s in group] for group in sequences()]
    stream = Criticised(Blocks(wrong), critic, config, Context(tmp_path))
    for step in range(2):
        stream.batch(step, trainer)
    with pytest.raises(CuveeError, match="max_skipped: the value network's loss .* 3 steps in a row, the last one 3"):
        stream.batch(2, trainer)


def test_the_first_steps_train_the_value_network_alone(speaker, prompts, tmp_path):
    values = {**RL, "steps": 4, "objective": "ppo", "options": {"value_steps": 2}}
    metrics = run("train.rl", values, tmp_path / "out", init=speaker, prompts=prompts)
    points = [json.loads(p) for p in (tmp_path / "out-scratch/metrics.jsonl").read_text().splitlines()]
    assert [p["grad_norm"] > 0 for p in points if "grad_norm" in p] == [False, False, True, True]
    assert len([p for p in points if "value/explained" in p]) == 4 and 0 <= metrics["kl"] < 1


def test_refused_where_it_cannot_learn(start, prompts, tmp_path):
    with pytest.raises(ConfigError, match="objective: ppo needs a value network; use the stage train.rl"):
        run("train.preference", {**COMMON, "objective": "ppo"}, tmp_path / "out", init=start, pairs=None)
    values = {**RL, "steps": 3, "objective": "ppo", "options": {"value_steps": 3}}
    with pytest.raises(ConfigError, match="value_steps: 3 of 3 steps train the value network alone"):
        run("train.rl", values, tmp_path / "out", init=start, prompts=prompts)
    for options, words in (({"lam": 1.5}, "options.lam: 1.5"), ({"clip": -1.0}, "options.clip")):
        with pytest.raises(ConfigError, match=words):
            run("train.rl", values | {"options": options}, tmp_path / "out", init=start, prompts=prompts)
