"""muP's coordinate check (Yang et al. 2022, appendix D.1): a few Adam steps move activations alike at every width."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.model import mup, weights
from stages.model.config import ModelConfig
from stages.model.cpu import cuda_names
from stages.model.packing import pack
from stages.objectives import ce
from stages.trainer import optimizer
from stages.trainer.batch import Sequence
from stages.trainer.config import TrainConfig
from stages.trainer.trainer import Trainer

WIDTHS = (64, 128, 256, 512)
FLAT = 1.15  # largest ratio over all widths
FAMILIES = {
    "cohere2, tied": {"family": "cohere2", "tie_embeddings": True, "sliding_window": 16},
    "llama, an output layer of its own": {"family": "llama", "tie_embeddings": False, "sliding_window": 0},
}


def sizes(width: int, on: bool, **family) -> ModelConfig:
    config = ModelConfig(
        num_layers=3, hidden_size=width, ffn_hidden_size=2 * width, num_attention_heads=width // 16,
        num_query_groups=width // 32, head_dim=16, vocab_size=256, logit_scale=1.0, init_std=0.1,
        max_position_embeddings=128, mup_base_width=WIDTHS[0] if on else 0, **family,
    )  # fmt: skip
    config.check()
    return config


def coordinates(config: ModelConfig) -> dict[str, float]:
    """After 4 steps: mean size of each layer's output, and how much the right token's logit rose above the others."""
    trainer = Trainer(TrainConfig(steps=4, weight_decay=0.0), config, lambda batch: ce.loss(batch, ce.Config()))
    (model,) = trainer.chunks
    tokens = np.random.default_rng(0).integers(256, size=64).repeat(2)
    found = {}

    def logits() -> torch.Tensor:
        with cuda_names(), torch.no_grad():
            return model(torch.from_numpy(tokens)[None], pack([len(tokens)]), torch.arange(len(tokens)))

    start = logits()
    for _ in range(4):
        trainer.step([[Sequence(tokens.astype(np.int32), np.ones(len(tokens), np.float32))]], 3e-3)
    hooks = [
        layer.register_forward_hook(lambda *a, name=f"layer {i}": found.update({name: float(a[-1][0].abs().mean())}))
        for i, layer in enumerate(model.decoder.layers)
    ]
    change = (logits() - start)[:-1]
    found["logits"] = float(change.gather(1, torch.from_numpy(tokens[1:, None])).mean() - change.mean())
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_coordinates_are_flat_in_width_with_mup_and_grow_without(name):
    found = {on: [coordinates(sizes(width, on, **FAMILIES[name])) for width in WIDTHS] for on in (True, False)}
    assert found[True][0] == found[False][0]  # at the base width nothing changes
    for coordinate in found[True][0]:
        flat, grown = ([point[coordinate] for point in found[on]] for on in (True, False))
        assert max(flat) / min(flat) < FLAT, (coordinate, flat)
        assert grown == sorted(grown) and grown[-1] / grown[0] > 3, (coordinate, grown)


@pytest.mark.parametrize("module,rule", [
    (optimizer, "lr_multiplier"), (mup, "init_multiplier"), (mup, "output_multiplier"),
])  # fmt: skip
def test_each_rule_is_needed(module, rule, monkeypatch):
    monkeypatch.setattr(module, rule, lambda *_: 1.0)
    narrow, wide = (coordinates(sizes(width, True, **FAMILIES["cohere2, tied"])) for width in (WIDTHS[0], WIDTHS[-1]))
    assert any(wide[c] / narrow[c] > FLAT for c in narrow), (narrow, wide)


@pytest.mark.parametrize("name", FAMILIES)
def test_multipliers_are_table_8s(name):
    config = sizes(256, True, **FAMILIES[name])
    tied, plain = config.tie_embeddings, replace(config, mup_base_width=0)
    rows, before = weights.table(config), weights.table(plain)
    for row, other in zip(rows, before, strict=True):
        hidden = "linear" in row.name
        assert mup.lr_multiplier(config, row.name) == (1 / 4 if hidden or "output_layer" in row.name else 1.0)
        assert mup.lr_multiplier(plain, row.name) == 1.0
        factor = 1 / 2 if hidden else 1 / 4 if "output_layer" in row.name else 1
        assert row.std == (other.std if other.std is None else pytest.approx(other.std * factor))
    assert config.output_scale == (1 / 4 if tied else 1.0)
    assert mup.lr_multiplier(config, "output_layer.weight") == (1.0 if tied else 1 / 4)  # tied: a pipeline stage's copy
    assert config.to_hf().get("logit_scale", 1.0) == config.output_scale
