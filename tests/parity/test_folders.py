"""Model folders: the same bytes after a round trip, and one sentence for one that we cannot build or read."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.export import huggingface
from stages.model import folder, parity, weights
from stages.model.config import ModelConfig
from stages.stage import Context, CuveeError
from tests.parity.families import COHERE2, FAMILIES, LLAMA, QWEN2, again, build, export, files, theirs
from tests.unit.tiny import tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    return FAMILIES[request.param], export(FAMILIES[request.param], 3, tmp_path_factory.mktemp("made") / "model")


def test_export_import_export_is_byte_identical(made, tmp_path):
    config, first = made
    assert folder.read_config(first) == config
    assert files(again(first, tmp_path / "second")) == files(first)


@pytest.mark.parametrize("change", [
    {"mup_base_width": 24, "logit_scale": 0.3}, {"mup_base_width": 24, "logit_scale": 1.0, "family": "llama",
    "tie_embeddings": False, "sliding_window": 0}, {"family": "qwen2", "logit_scale": 1.0, "dynamic_ntk": True,
    "logn_attention": True, "trained_length": 64}, {"family": "qwen2", "logit_scale": 1.0, "sliding_window_pattern": 2},
])  # fmt: skip
def test_every_option_survives_the_round_trip(change):
    config = replace(COHERE2, **change)
    config.check()
    written = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(written) == config
    assert ModelConfig.from_hf(written).to_hf() == config.to_hf()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers_keeps_its_weights(family, tmp_path):
    """BF16 in several files -> ours in FP32 -> the same bytes again, and BF16 again without a loss."""
    model, path = theirs(FAMILIES[family]).bfloat16(), tmp_path / "theirs"
    model.save_pretrained(path, max_shard_size="20KB")
    tokenizer(path)
    first = again(path, tmp_path / "first")
    assert files(again(first, tmp_path / "second")) == files(first)
    state = load_file(first / "model.safetensors")
    source = weights.Folder(path)
    assert state.keys() == source.keys() and all(torch.equal(state[name], source[name]) for name in state)
    huggingface.cast(first, tmp_path, "bfloat16")
    half = load_file(tmp_path / "model.safetensors")
    assert all(t.dtype == torch.bfloat16 and torch.equal(t.float(), state[name]) for name, t in half.items())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_hold_the_same_tensors_and_load_in_transformers(made, tmp_path):
    config, first = made
    path = tmp_path / "model"
    shutil.copytree(first, path)
    model, rows = build(config, weights.Folder(path))
    (path / "model.safetensors").unlink()
    weights.save(model, rows, path, shard_bytes=20_000)
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 2 and all(f.stat().st_size < 60_000 for f in shards)
    parts = {name: tensor for f in shards for name, tensor in load_file(f).items()}
    whole = load_file(first / "model.safetensors")
    assert parts.keys() == whole.keys() and all(torch.equal(parts[k], whole[k]) for k in whole)
    assert parity.check(path, Context(scratch=tmp_path))["max_abs_difference"] < 1e-4


def test_converters_find_what_their_version_reads():
    hf = FAMILIES["llama"].to_hf()
    assert hf["rope_theta"] == hf["rope_parameters"]["rope_theta"] == 500.0
    assert hf["rope_scaling"].items() <= hf["rope_parameters"].items()
    assert isinstance(hf["rope_scaling"]["original_max_position_embeddings"], int)
    assert COHERE2.to_hf()["rotary_pct"] == 1.0  # llama.cpp stops without
    from transformers import AutoConfig

    hf.pop("model_type")
    loaded = AutoConfig.for_model("llama", **hf)
    assert loaded.rope_parameters == FAMILIES["llama"].to_hf()["rope_parameters"]


def test_a_wrong_set_of_keys_is_listed(made, tmp_path):
    config, path = made
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
    tensors["model.norm.weight"] = torch.zeros(31)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CuveeError) as error:
        weights.check(weights.table(config), weights.Folder(tmp_path), str(path))
    for part in ("missing model.layers.1.mlp.up_proj", "unknown model.layers.9.mlp.up_proj", "is [31], expected [32]"):
        assert part in str(error.value)


def test_weights_of_another_family_are_listed(tmp_path):
    path = export(LLAMA, 0, tmp_path / "model")
    with pytest.raises(CuveeError, match=r"missing model.layers.0.self_attn.k_proj.bias"):
        weights.check(weights.table(QWEN2), weights.Folder(path), str(path))
    with pytest.raises(CuveeError, match=r"unknown lm_head.weight; unknown model.layers.0.post_attention_layernorm"):
        weights.check(weights.table(COHERE2), weights.Folder(path), str(path))


@pytest.mark.parametrize("damage", ["cut", "shard gone", "broken index", "no weights"])
def test_unreadable_weights_are_one_sentence(damage, made, tmp_path):
    config, first = made
    model, rows = build(config, weights.Folder(first))
    weights.save(model, rows, tmp_path, shard_bytes=20_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    elif damage == "shard gone":
        shard.unlink()
    elif damage == "broken index":
        (tmp_path / weights.INDEX).write_text("{}")
    else:
        tmp_path = tmp_path / "nothing"
    with pytest.raises(CuveeError, match="no readable weights"):
        weights.Folder(tmp_path)


REFUSED = [
    ("cohere2", {"model_type": "mixtral"}, "model_type: 'mixtral' is not known"),
    ("cohere2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but only 'silu'"),
    ("cohere2", {"attention_bias": True}, "attention_bias is True"),
    ("cohere2", {"tie_word_embeddings": False}, "tie_embeddings: False"),
    ("cohere2", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    ("cohere2", {"mup": {"base_width": 16, "logit_scale": 1.0}}, "logit_scale is 1.0"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    ("llama", {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
    ("llama", {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
     "partial_rotary_factor 0.5"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling has no low_freq_factor"),
    ("llama", {"head_dim": 16}, "head_dim: 16"),
    ("llama", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
               "use_sliding_window": True, "sliding_window": 8}, "layer_types"),
    ("qwen2", {"layer_types": None, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
     "max_window_layers 2"),
]  # fmt: skip


@pytest.mark.parametrize("family,change,sentence", REFUSED, ids=lambda x: str(x)[:40])
def test_a_config_that_we_do_not_build_is_refused(family, change, sentence, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES[family].to_hf() | change))
    with pytest.raises(CuveeError) as error:
        folder.read_config(tmp_path)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change,field", [
    ({"family": "llama"}, "sliding_window: 16"), ({"family": "qwen2", "logit_scale": 0.5}, "logit_scale: 0.5"),
    ({"family": "qwen2", "mup_base_width": 8}, "mup_base_width: 8 with tied"), ({"tie_embeddings": False}, "tie_emb"),
    ({"sliding_window": 0}, "sliding_window: 0"), ({"logn_attention": True}, "logn_attention: True"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_scaling"), ({"mup_base_width": -1}, "mup_base_width: -1"),
])  # fmt: skip
def test_a_combination_that_no_family_has_is_refused(change, field):
    with pytest.raises(CuveeError, match=field):
        replace(COHERE2, **change).check()


def test_a_config_that_is_no_config_is_one_sentence(tmp_path):
    with pytest.raises(CuveeError, match="config.json can't be read"):
        folder.read_config(tmp_path)
    for text, sentence in (
        ('{"model_type": "llama"}', "can't be read.*num_attention_heads"), ("[]", "can't be read"), ("{", "can't be read"),
        ('{"model_type": "gpt2", "n_head": 12}', "model_type: 'gpt2' is not known"),
        (json.dumps(COHERE2.to_hf() | {"vocab_size": "many"}), "can't be read"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CuveeError, match=sentence):
            folder.read_config(tmp_path)


def test_a_full_disk_is_an_oserror(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    with pytest.raises(OSError) as error, folder.full_disk_is_oserror(tmp_path):
        raise RuntimeError("unexpected pos 704 vs 598")
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path)


def test_initial_weights_depend_on_seed_and_name_alone():
    rows = weights.table(COHERE2)
    a, b, other = weights.Initial(rows, 0), weights.Initial(rows[::-1], 0), weights.Initial(rows, 1)
    name = "model.layers.2.self_attn.k_proj.weight"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], other[name])
    assert not torch.equal(a[name], a["model.layers.1.self_attn.k_proj.weight"])
