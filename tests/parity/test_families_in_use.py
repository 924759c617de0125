"""Families other than Command A's through the trainer, in parallel, and through everything that takes a model folder."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.merge import soup
from stages.objectives import ce
from stages.rewards.reward_model import Scorer
from stages.rollout.engines import transformers as engines
from stages.rollout.engines._engine import parity
from stages.stage import Context, Kind
from stages.trainer.trainer import Trainer
from tests.parity.families import FAMILIES, LLAMA, QWEN2, export
from tests.resume.test_trainer_parallel import launch, losses
from tests.resume.trainer_run import SIZES, Counting, config, regress
from tests.unit.tiny import artifact, tokenizer

OTHERS = {
    "qwen2": QWEN2,
    "qwen2 with windows, tied": replace(QWEN2, sliding_window=8, tie_embeddings=True),
    "llama": LLAMA,
    "llama 3.1, muP": replace(FAMILIES["llama"], mup_base_width=16),
}


def cross_entropy(batch):
    return ce.loss(batch, ce.Config())


@pytest.mark.parametrize("name", [name for name in OTHERS if "muP" not in name])
def test_training_equals_a_plain_transformers_loop(name):
    """Same initial weights, batches, AdamW and clipping, one document at a time: the same losses and weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes, c = replace(OTHERS[name], init_std=0.05), config(weight_decay=0.1, clip_grad=0.5, lr=5e-3)
    trainer = Trainer(c, sizes, cross_entropy)
    hf = sizes.to_hf() | {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(hf.pop("model_type"), **hf))
    plain.load_state_dict(trainer.hf_state(), strict=not sizes.tie_embeddings)
    decayed = [p for p in plain.parameters() if p.dim() > 1]
    others = [p for p in plain.parameters() if p.dim() == 1]  # norms and biases
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(c.beta1, c.beta2), eps=c.epsilon,
    )  # fmt: skip
    for step in range(4):
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


@pytest.mark.parametrize(
    "layout", [{"tensor_parallel": 2, "sequence_parallel": True}, {"pipeline_parallel": 2}], ids=str
)
def test_biases_and_an_output_layer_of_its_own_in_parallel(layout, tmp_path):
    sizes = {"family": "qwen2", "tie_embeddings": False, "sliding_window": 0}
    words = tokenizer(tmp_path / "words")
    assert launch(2, tmp_path, words, steps=4, log_every=1, sizes=sizes, **layout) == [0, 0]
    c = config(steps=4)
    trainer = Trainer(c, replace(SIZES, **sizes), cross_entropy)
    found = [trainer.step(Counting().batch(i, None), c.learning_rate(i))["loss"] for i in range(4)]
    assert losses(tmp_path) == pytest.approx(found, abs=1e-5)
    ours, theirs = trainer.hf_state(), load_file(tmp_path / "out/model.safetensors")
    assert ours.keys() == theirs.keys() and "lm_head.weight" in ours
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < 1e-4


@pytest.fixture(scope="module", params=OTHERS)
def model(request, tmp_path_factory):
    """A folder of a family, and the context of a stage."""
    root = tmp_path_factory.mktemp("model")
    return export(OTHERS[request.param], 0, root / "model"), Context(scratch=root)


def test_the_rollout_engine_writes_what_transformers_would(model):
    folder, ctx = model
    engine = engines.Engine(folder, ctx)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(20, 270, length).tolist() for length in (3, 30, 11, 1)]  # shorter and longer than a window
    found = engine.generate(prompts, n=1, max_new_tokens=16, temperature=0.0, seed=0, stop=[8])
    sampled = engine.generate(prompts, n=2, max_new_tokens=16, temperature=1.0, seed=0, stop=[8])
    for prompt, (greedy,), several in zip(prompts, found, sampled, strict=True):
        ids = torch.tensor([prompt])
        expected = engine.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, eos_token_id=8,
            pad_token_id=0, suppress_tokens=list(range(len(engine.tokenizer), 320)),
        )  # fmt: skip
        assert greedy.ids == expected[0, len(prompt) :].tolist()
        for c in (greedy, *several):
            full = engine.logprobs([prompt + c.ids])[0][len(prompt) - 1 :]
            assert c.logprobs == pytest.approx(full.tolist(), abs=2e-4)


def test_the_engine_takes_the_trainers_weights_and_they_agree(model):
    from stages.model.folder import read_config

    folder, ctx = model
    trainer = Trainer(config(), read_config(folder), cross_entropy, init=folder)
    trainer.step(Counting().batch(0, None), 1e-2)
    engine = engines.Engine(folder, ctx, trainer.hf_state())
    groups = [[replace(s, mask=np.ones_like(s.mask))] for group in Counting(seed=5).batch(0, None) for s in group]
    sequences = [s.tokens.tolist() for (s,) in groups]
    assert parity(engine, sequences, trainer.logprobs(groups), trainer.hf_state()) < 1e-3


def test_a_soup_of_two_is_their_mean(model, tmp_path):
    folder, ctx = model
    from stages.model.folder import read_config

    other = export(read_config(folder), 1, tmp_path / "other")
    models = {name: artifact(path, Kind.CHECKPOINT, name=name) for name, path in (("a", folder), ("b", other))}
    (tmp_path / "out").mkdir()
    soup.run(soup.Config(), {"models": models}, tmp_path / "out", ctx)
    a, b, mean = (load_file(path / "model.safetensors") for path in (folder, other, tmp_path / "out"))
    assert a.keys() == mean.keys()
    assert all(torch.allclose(mean[k], (a[k] + b[k]) / 2, atol=1e-6) for k in a)
    assert asdict(read_config(tmp_path / "out")) == asdict(read_config(folder))


def test_a_reward_model_starts_from_it_and_is_read_back(model, tmp_path):
    from stages.model import folder as folders

    folder, ctx = model
    sizes = folders.read_config(folder)
    trainer = Trainer(config(), sizes, regress, init=folder, head="reward")
    assert "lm_head.weight" not in trainer.hf_state()
    first = trainer.step(Counting().batch(0, None), 1e-3)["loss"]
    assert math.isfinite(first) and trainer.step(Counting().batch(0, None), 1e-3)["loss"] < first
    trainer.save_weights(tmp_path)
    folders.write(tmp_path, sizes, folder)
    scores = Scorer(tmp_path, ctx)([[9, 10, 11], [12] * 40])
    again = Trainer(config(), sizes, regress, init=tmp_path, head="reward")
    assert torch.equal(again.hf_state()["score.weight"], trainer.hf_state()["score.weight"])
    assert all(map(math.isfinite, scores)) and scores[0] != scores[1]
