"""The rollout engine on a GPU: graphs replay what transformers computes, and the trainer agrees with what is sampled."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from stages.rollout.engines.transformers import Engine
from stages.stage import Context
from tests.unit.tiny import checkpoint

STOP = 8
WINDOW = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """2 query heads to 1 key/value head, every second layer with a window."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "sliding_window": WINDOW}
    return checkpoint(tmp_path_factory.mktemp("model"), spread=0.2, **sizes)


@pytest.fixture
def engine(folder):
    return Engine(folder, Context(scratch=folder, device="cuda"))


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    lengths = (3, 1, 40, WINDOW, WINDOW + 1, 3 * WINDOW, 250, 17)
    return [[rng.randrange(20, 270) for _ in range(length)] for length in lengths]


def exact(engine):
    """The engine in FP32, where the same tokens must come out."""
    engine.model.float()
    return engine


def greedy(engine, prompt, new):
    ids = torch.tensor([prompt], device="cuda")
    out = engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, eos_token_id=STOP, pad_token_id=0
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_generate(engine, prompts):
    exact(engine)
    found = engine.generate(prompts, n=1, max_new_tokens=200, temperature=0.0, seed=0, stop=[STOP])
    assert engine.slots.graphs
    for prompt, (completion,) in zip(prompts, found, strict=True):
        assert completion.ids == greedy(engine, prompt, 200)


def test_few_slots_serve_many_rows(engine, prompts, monkeypatch):
    """Refilled and moved together while they are replayed: the same samples as with a slot for each, in FP32."""
    from stages.rollout.engines import transformers as engines

    exact(engine)
    stop = list(range(0, 270, 30))
    draw = lambda: engine.generate(prompts * 4, n=4, max_new_tokens=64, temperature=1.0, seed=1, stop=stop)  # noqa: E731
    whole = draw()
    monkeypatch.setitem(engines.ROWS, "cuda", 32)
    engine.slots = None
    assert [[c.ids for c in row] for row in draw()] == [[c.ids for c in row] for row in whole]
    assert engine.slots.rows == 32


def test_samples_have_the_log_probabilities_of_a_full_forward_pass(engine, prompts):
    found = engine.generate(prompts, n=4, max_new_tokens=128, temperature=1.0, seed=2, stop=[STOP])
    for prompt, completions in zip(prompts, found, strict=True):
        for c in completions:
            expected = engine.logprobs([prompt + c.ids])[0][len(prompt) - 1 :]
            assert c.logprobs == pytest.approx(expected.tolist(), abs=0.1)


def test_replays_take_new_weights_and_no_new_graphs(engine, prompts):
    draw = lambda: engine.generate(prompts, n=2, max_new_tokens=32, temperature=1.0, seed=3, stop=[STOP])  # noqa: E731
    first = draw()
    graphs = dict(engine.slots.graphs)
    assert draw() == first
    state = {k: v.float().clone() for k, v in engine.model.state_dict().items() if k != "lm_head.weight"}
    engine.sync_weights({k: v.roll(1, 0) if "down_proj" in k else v for k, v in state.items()})
    assert draw() != first
    engine.sync_weights(state)
    assert draw() == first and engine.slots.graphs == graphs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trainer_and_engine_agree(engine, folder, prompts, precision):
    from stages.model.folder import read_config
    from stages.rollout.engines._engine import parity
    from stages.trainer.batch import Sequence
    from stages.trainer.config import TrainConfig
    from stages.trainer.trainer import Trainer

    trainer = Trainer(TrainConfig(precision=precision), read_config(folder), lambda packed: None, folder)
    if precision == "fp32":
        exact(engine)
    engine.sync_weights(trainer.hf_state())
    probes = [p for p in prompts if len(p) > 1]
    groups = [[Sequence(np.array(p, np.int32), np.ones(len(p), np.float32))] for p in probes]
    gap = parity(engine, probes, trainer.logprobs(groups), trainer.hf_state())
    print(f"{precision}: engine and trainer differ by at most {gap:.2g} nats")
    assert gap < (5e-3 if precision == "fp32" else 0.2)
