"""Our Cohere2 on Megatron-core against transformers': logits, folders both ways, and what the gate must catch."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.model import cohere2, folder, parity, weights
from stages.model.config import ModelConfig
from stages.model.cpu import cuda_names
from stages.model.model import Model
from stages.model.packing import pack
from stages.stage import Context, CuveeError
from stages.trainer import parallel
from stages.trainer.config import TrainConfig
from tests.unit.tiny import tokenizer

SMALL = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=8,
    vocab_size=320, sliding_window=16, logit_scale=1.0, init_std=0.3, max_position_embeddings=256,
)  # fmt: skip
SIZES = {
    "grouped queries": SMALL,
    "one key/value head": replace(SMALL, num_query_groups=1, logit_scale=0.25),
    "as many keys as queries": replace(SMALL, num_query_groups=4, rope_theta=10000.0),
    "layers not a multiple of the pattern": replace(SMALL, num_layers=3, sliding_window_pattern=2, sliding_window=7),
    "positions within the window": replace(SMALL, max_position_embeddings=12),
}


def export(config: ModelConfig, seed: int, out: Path) -> Path:
    """A folder of `config` with random weights, every norm's weight included."""
    out.mkdir(parents=True, exist_ok=True)
    rows = cohere2.table(config)
    source = weights.Initial([replace(row, std=row.std or 0.5) for row in rows], seed)
    with cuda_names():
        parallel.initialise(TrainConfig())
        model = Model(config, "lm")
        weights.load(model, rows, source)
    weights.save(model, rows, out)
    folder.write(out, config, tokenizer(out.parent / "tokenizer"))
    return out


@pytest.fixture
def ctx(tmp_path):
    return Context(scratch=tmp_path)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_logits_equal_transformers(name, seed, tmp_path, ctx):
    found = parity.check(export(SIZES[name], seed, tmp_path / "model"), ctx)
    assert found["max_abs_difference"] < 1e-4
    if name != "positions within the window":
        assert found["longest"] > 2 * found["sliding_window"]


@pytest.mark.parametrize("change", [
    {"sliding_window": 15}, {"sliding_window": 17}, {"rope_theta": 9000.0}, {"sliding_window_pattern": 2},
    {"logit_scale": 0.5}, {"norm_epsilon": 1e-2},
])  # fmt: skip
def test_gate_catches_a_config_of_another_model(change, tmp_path, ctx, monkeypatch):
    path = export(SMALL, 0, tmp_path / "model")
    sequences = parity._sequences(SMALL, 0)
    theirs = parity._theirs(path, sequences)
    monkeypatch.setattr(parity, "_theirs", lambda *_: theirs)
    monkeypatch.setattr(parity, "_sequences", lambda *_: sequences)
    (path / "config.json").write_text(json.dumps(replace(SMALL, **change).to_hf()))
    with pytest.raises(CuveeError, match="logits differ"):
        parity.check(path, ctx)


def test_export_import_export_is_byte_identical(tmp_path):
    first = export(SMALL, 3, tmp_path / "first")
    config, second = folder.read_config(first), tmp_path / "second"
    second.mkdir()
    rows = cohere2.table(config)
    with cuda_names():
        model = Model(config, "lm")
        weights.load(model, rows, weights.Folder(first))
    weights.save(model, rows, second)
    folder.write(second, config, first)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_shards_hold_the_same_tensors_and_load_in_transformers(tmp_path, ctx):
    path = export(SMALL, 0, tmp_path / "model")
    whole = load_file(path / "model.safetensors")
    config, rows = folder.read_config(path), cohere2.table(SMALL)
    with cuda_names():
        model = Model(config, "lm")
        weights.load(model, rows, weights.Folder(path))
    (path / "model.safetensors").unlink()
    weights.save(model, rows, path, shard_bytes=20_000)
    files = sorted(path.glob("model-*.safetensors"))
    assert len(files) > 2 and all(f.stat().st_size < 60_000 for f in files)
    parts = {name: tensor for f in files for name, tensor in load_file(f).items()}
    assert parts.keys() == whole.keys() and all(torch.equal(parts[k], whole[k]) for k in whole)
    assert parity.check(path, ctx)["max_abs_difference"] < 1e-4


def test_a_folder_written_by_transformers_loads(tmp_path, ctx):
    from tests.unit.tiny import checkpoint

    path = checkpoint(tmp_path / "theirs", sliding_window=8)
    assert parity.check(path, ctx)["max_abs_difference"] < 1e-4
    assert folder.read_config(path).parameters() == sum(
        t.numel() for t in load_file(path / "model.safetensors").values()
    )


def test_documents_do_not_see_each_other(tmp_path):
    path = export(SMALL, 0, tmp_path / "model")
    lengths = [1, 40, 3, 200, 17, 16, 40]
    sequences = list(torch.randint(320, (sum(lengths),), generator=torch.Generator().manual_seed(0)).split(lengths))
    rows = cohere2.table(SMALL)
    with cuda_names(), torch.no_grad():
        model = Model(SMALL, "lm")
        weights.load(model, rows, weights.Folder(path))
        packed = model(torch.cat(sequences)[None], pack(lengths), torch.arange(sum(lengths))).split(lengths)
        for together, tokens in zip(packed, sequences, strict=True):
            alone = model(tokens[None], pack([len(tokens)]), torch.arange(len(tokens)))
            assert (together - alone).abs().max() < 1e-4


def test_a_wrong_set_of_keys_is_listed(tmp_path):
    path = export(SMALL, 0, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
    tensors["model.norm.weight"] = torch.zeros(31)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CuveeError) as error:
        weights.check(cohere2.table(SMALL), weights.Folder(path), str(path))
    for part in ("missing model.layers.1.mlp.up_proj", "unknown model.layers.9.mlp.up_proj", "is [31], expected [32]"):
        assert part in str(error.value)


def test_unreadable_folders_are_one_sentence(tmp_path):
    path = export(SMALL, 0, tmp_path / "model")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CuveeError, match="no readable weights"):
        weights.Folder(path)
    shutil.rmtree(path)
    with pytest.raises(CuveeError, match="config.json can't be read"):
        folder.read_config(path)


def test_a_full_disk_is_an_oserror(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    with pytest.raises(OSError) as error, folder.full_disk_is_oserror(tmp_path):
        raise RuntimeError("unexpected pos 704 vs 598")
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path)


@pytest.mark.parametrize("config,count", [
    (ModelConfig(), 8_028_033_024),
    (ModelConfig(num_layers=64, hidden_size=12288, num_attention_heads=96, ffn_hidden_size=36864), 111_057_580_032),
])  # fmt: skip
def test_published_parameter_counts(config, count):
    assert config.parameters() == count
    assert sum(torch.Size(shape).numel() for row in cohere2.table(config) for shape in row.hf.values()) == count


def test_initial_weights_depend_on_seed_and_name_alone():
    rows = cohere2.table(SMALL)
    a, b, other = weights.Initial(rows, 0), weights.Initial(rows[::-1], 0), weights.Initial(rows, 1)
    name = "model.layers.2.self_attn.k_proj.weight"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], other[name])
    assert not torch.equal(a[name], a["model.layers.1.self_attn.k_proj.weight"])
