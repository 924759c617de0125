"""Our models on Megatron-core against transformers': logits of every family, and what the gate must catch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.model import folder, parity, weights
from stages.model.cpu import cuda_names
from stages.model.packing import pack
from stages.stage import Context, CuveeError
from tests.parity.families import COHERE2, FAMILIES, LLAMA, LLAMA31, QWEN2, build, export, theirs

SIZES = {
    "cohere2: grouped queries": COHERE2,
    "cohere2: one key/value head": replace(COHERE2, num_query_groups=1, logit_scale=0.25),
    "cohere2: as many keys as queries": replace(COHERE2, num_query_groups=4, rope_theta=10000.0),
    "cohere2: layers not a multiple of the pattern": replace(
        COHERE2, num_layers=3, sliding_window_pattern=2, sliding_window=7
    ),
    "cohere2: positions within the window": replace(COHERE2, max_position_embeddings=12),
    "cohere2: muP": replace(COHERE2, mup_base_width=12),
    "qwen2: untied": QWEN2,
    "qwen2: tied, one key/value head": replace(QWEN2, tie_embeddings=True, num_query_groups=1),
    "qwen2: windows on three layers of four": replace(QWEN2, sliding_window=16),
    "qwen2: windows on all layers": replace(QWEN2, sliding_window=16, sliding_window_pattern=5, num_query_groups=4),
    "qwen2: Qwen v1's options within the trained length": replace(
        QWEN2, dynamic_ntk=True, logn_attention=True, trained_length=100
    ),
    "llama: untied": LLAMA,
    "llama: tied, muP off": replace(LLAMA, tie_embeddings=True, num_query_groups=4),
    "llama: rope scaling of 3.1": LLAMA31,
    "llama: untied, muP": replace(LLAMA, mup_base_width=12),
}


@pytest.fixture
def ctx(tmp_path):
    return Context(scratch=tmp_path)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_logits_equal_transformers(name, seed, tmp_path, ctx):
    config = SIZES[name]
    found = parity.check(export(config, seed, tmp_path / "model"), ctx)
    assert found["max_abs_difference"] < 1e-4
    window = config.sliding_window
    assert found["sliding_window"] == window
    assert found["longest"] > 2 * window or "within" in name


COMMON = [{"rope_theta": 9000.0}, {"norm_epsilon": 1e-2}]
CHANGES = [
    *(("cohere2", c) for c in (
        *COMMON, {"sliding_window": 15}, {"sliding_window": 17}, {"sliding_window_pattern": 2}, {"logit_scale": 0.5},
        {"mup_base_width": 16},
    )),
    *(("qwen2", c) for c in (*COMMON, {"sliding_window": 16, "sliding_window_pattern": 4})),
    *(("llama", c) for c in (*COMMON, {"rope_scaling": {}}, {"rope_scaling": LLAMA31.rope_scaling | {"factor": 4.0}})),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of each family with transformers' logits."""
    found = {}
    for name, config in FAMILIES.items():
        path = export(config, 0, tmp_path_factory.mktemp(name) / "model")
        sequences = parity._sequences(config, 0)
        found[name] = path, sequences, parity._theirs(path, sequences)
    return found


@pytest.mark.parametrize("family,change", CHANGES, ids=str)
def test_gate_catches_a_config_of_another_model(family, change, made, tmp_path, ctx, monkeypatch):
    path, sequences, logits = made[family]
    _damage(monkeypatch, sequences, logits)
    config = replace(FAMILIES[family], **change)
    monkeypatch.setattr(parity, "read_config", lambda _: config)
    with pytest.raises(CuveeError, match="logits differ"):
        parity.check(path, ctx)


@pytest.mark.parametrize("family,tensor", [
    ("qwen2", "model.layers.1.self_attn.q_proj.bias"), ("qwen2", "model.layers.3.self_attn.k_proj.bias"),
    ("qwen2", "model.layers.0.self_attn.v_proj.bias"), ("llama", "model.layers.2.post_attention_layernorm.weight"),
    ("llama", "lm_head.weight"), ("cohere2", "model.layers.0.self_attn.k_proj.weight"),
])  # fmt: skip
def test_gate_catches_a_tensor_of_zeros(family, tensor, made, tmp_path, ctx, monkeypatch):
    path, sequences, logits = made[family]
    _damage(monkeypatch, sequences, logits)
    state = load_file(path / "model.safetensors")
    state[tensor] = torch.zeros_like(state[tensor])
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    with pytest.raises(CuveeError, match="logits differ"):
        parity.check(tmp_path, ctx)


def _damage(monkeypatch, sequences, logits):
    monkeypatch.setattr(parity, "_sequences", lambda *_: sequences)
    monkeypatch.setattr(parity, "_theirs", lambda *_: logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_written_by_transformers_loads(family, tmp_path, ctx):
    """BF16, in several files, with transformers' own config.json."""
    model = theirs(FAMILIES[family]).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert parity.check(tmp_path, ctx)["max_abs_difference"] < 1e-4
    assert folder.read_config(tmp_path).parameters() == sum(p.numel() for p in model.parameters())


def test_a_config_of_transformers_4_means_the_same(tmp_path, ctx):
    """Llama 3.1's file as Meta published it: RoPE at the top level, torch_dtype."""
    path = export(LLAMA31, 0, tmp_path / "model")
    hf = json.loads((path / "config.json").read_text())
    del hf["rope_parameters"], hf["dtype"]
    (path / "config.json").write_text(json.dumps(hf | {"torch_dtype": "bfloat16"}))
    assert folder.read_config(path) == LLAMA31
    assert parity.check(path, ctx)["max_abs_difference"] < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_do_not_see_each_other(family):
    config = FAMILIES[family]
    lengths = [1, 40, 3, 200, 17, 16, 40]
    sequences = list(torch.randint(320, (sum(lengths),), generator=torch.Generator().manual_seed(0)).split(lengths))
    model, _ = build(config, weights.Initial(weights.table(config), 0))
    with cuda_names(), torch.no_grad():
        packed = model(torch.cat(sequences)[None], pack(lengths), torch.arange(sum(lengths))).split(lengths)
        for together, tokens in zip(packed, sequences, strict=True):
            alone = model(tokens[None], pack([len(tokens)]), torch.arange(len(tokens)))
            assert (together - alone).abs().max() < 1e-4


def test_a_large_vocabulary_is_compared_at_some_positions(made, ctx, monkeypatch):
    path, sequences, _ = made["cohere2"]
    monkeypatch.setattr(parity, "LOGITS", sum(map(len, sequences)) * 320 // 5)
    picked = parity._picked(sequences, 320)
    assert all(p[-1] == len(s) - 1 and len(p) == -(-len(s) // 5) for p, s in zip(picked, sequences, strict=True))
    assert parity.check(path, ctx)["max_abs_difference"] < 1e-4
    monkeypatch.setattr(parity, "read_config", lambda _: replace(COHERE2, rope_theta=9000.0))
    with pytest.raises(CuveeError, match="logits differ"):
        parity.check(path, ctx)
