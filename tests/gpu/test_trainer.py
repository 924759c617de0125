"""The trainer on a GPU: BF16 and FP8 learn what FP32 learns, a schedule of precisions, resume, and the exported model."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from tests.gpu.models import COHERE2
from tests.resume import trainer_run
from tests.unit.tiny import tokenizer

SIZES = {"hidden_size": 256, "ffn_hidden_size": 512, "head_dim": 64, "num_attention_heads": 4, "num_query_groups": 2}
FIELDS = {"steps": 30, "lr": 3e-3, "micro_batch_tokens": 512, "save_every": 10, "sizes": SIZES}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


def losses(root) -> dict[int, float]:
    points = [json.loads(line) for line in (root / "scratch/metrics.jsonl").read_text().splitlines()]
    return {point["step"]: point["loss"] for point in points}


@pytest.fixture(scope="module")
def exact(tmp_path_factory, words):
    root = tmp_path_factory.mktemp("fp32")
    trainer_run.run(root, words, precision="fp32", **FIELDS)
    return losses(root)


@pytest.mark.parametrize("precision", ["bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise"])
def test_learns_what_fp32_learns(precision, tmp_path, words, exact):
    trainer_run.run(tmp_path, words, precision=precision, **FIELDS)
    found = losses(tmp_path)
    assert exact[30] < 0.7 * exact[1]
    assert found[1] == pytest.approx(exact[1], abs=0.02 if precision == "bf16" else 0.1)
    assert found[30] == pytest.approx(exact[30], rel=0.02 if precision == "bf16" else 0.1)


def test_precision_changes_by_step(tmp_path, words, exact, capsys):
    phases = [["bf16", 8], ["fp8_delayed", 12], ["bf16", 10]]
    trainer_run.run(tmp_path, words, precision="bf16", precision_phases=phases, **FIELDS)
    found, said = losses(tmp_path), capsys.readouterr().out
    assert said.index("precision is fp8_delayed from step 9") < said.index("precision is bf16 from step 21")
    assert all(math.isfinite(loss) for loss in found.values())
    assert found[30] == pytest.approx(exact[30], rel=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp8_delayed"])
def test_resumes(precision, tmp_path, words, capsys):
    """A run that stopped goes on as the uninterrupted one, but for atomic additions in attention's backward pass."""
    fields = FIELDS | {"steps": 20, "save_every": 5, "precision": precision}
    trainer_run.run(tmp_path / "whole", words, **fields)
    trainer_run.run(tmp_path / "parts", words, **fields)
    whole = losses(tmp_path / "whole")
    # The newest checkpoint of the second run is its last step; drop it and go on from the one before.
    saved = sorted((tmp_path / "parts/scratch/checkpoints").iterdir())
    assert len(saved) == 2
    (saved[-1] / "commit.json").unlink()
    trainer_run.run(tmp_path / "parts", words, **fields)
    assert "resumed after step 15/20" in capsys.readouterr().out
    again = losses(tmp_path / "parts")
    assert [again[step] for step in range(16, 21)] == pytest.approx([whole[step] for step in range(16, 21)], rel=5e-3)


def test_exported_model_equals_the_trained_one(tmp_path, words):
    """The FP32 main weights leave, and transformers computes with them what BF16 layers trained."""
    import torch
    from transformers import AutoModelForCausalLM

    from stages.objectives import ce
    from stages.trainer.trainer import Trainer

    config = replace(trainer_run.config(), precision="bf16", steps=5)
    trainer = Trainer(config, COHERE2, lambda b: ce.loss(b, ce.Config()))
    stream = trainer_run.Counting()
    for step in range(5):
        trainer.step(stream.batch(step, trainer), 1e-3)
    trainer.save_weights(tmp_path)
    from stages.model import folder

    folder.write(tmp_path, COHERE2, words)
    state = {name: tensor.cpu() for name, tensor in trainer.hf_state().items()}
    rounded = sum(bool((t == t.bfloat16().float()).all()) for t in state.values() if t.ndim > 1)
    assert rounded == 0  # FP32 values, not the BF16 copies
    group = stream.batch(9, trainer)[0]
    ours = trainer.logprobs([group])[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).cuda()
    tokens = torch.from_numpy(group[0].tokens.astype("int64")).cuda()[None]
    with torch.no_grad():
        expected = torch.log_softmax(model(tokens).logits[0, :-1], -1).gather(1, tokens[0, 1:, None])[:, 0].cpu().numpy()
    kept = group[0].mask[1:] > 0
    assert abs(ours - expected)[kept].max() < 0.05
