"""Export: the folder that transformers loads, and the gate that refuses a model that it computes otherwise."""

from __future__ import annotations

import json

import pytest
import tiny
import yaml

from stages.export import huggingface
from stages.stage import CuveeError, Kind


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.checkpoint(tmp_path_factory.mktemp("export") / "model", num_hidden_layers=4, sliding_window_pattern=2)
    for name in ("record.json", "choice.json", "rollouts.jsonl", "samples.json"):  # what stages leave beside a model
        (folder / name).write_text("{}")
    above = {"name": "base", "stage": "train.pretrain", "seconds": 3.0, "config": {"lr": 1e-3}, "inputs": {}}
    link = {"fingerprint": "base0", "kind": "checkpoint"}
    return tiny.artifact(
        folder, Kind.CHECKPOINT, name="polished", stage="train.rl", seconds=2.0, config={"steps": 4},
        inputs={"init": link}, ancestors={"base0": above},
    )  # fmt: skip


@pytest.fixture(scope="module")
def export(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    metrics = huggingface.run(huggingface.Config(license="mit"), {"model": model}, out, tiny.context(out / "scratch"))
    return out, metrics


def test_parity_is_measured_beyond_the_window(export):
    out, metrics = export
    found = json.loads((out / "parity.json").read_text())
    assert found == metrics
    assert found["max_abs_difference"] < 1e-4 and found["longest"] > 2 * found["sliding_window"] == 16


def test_the_folder_generates_with_transformers(export, model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = export
    network, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    settings = network.generation_config
    assert (settings.eos_token_id, settings.bos_token_id, settings.pad_token_id, settings.do_sample) == (8, 5, 0, False)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert network.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]
    assert (out / "model.safetensors").read_bytes() == (model.path / "model.safetensors").read_bytes()
    assert not {"record.json", "choice.json", "rollouts.jsonl", "samples.json"} & {path.name for path in out.iterdir()}


def test_the_card_tells_how_it_was_made(export):
    _, front, body = (export[0] / "README.md").read_text().split("---\n", 2)
    assert (told := yaml.safe_load(front))["license"] == "mit"
    assert told["tags"] == ["cohere2"]  # nothing was merged on the way
    assert body.index("| `base` | train.pretrain | 3.0 | lr 0.001 |") < body.index("| `polished` | train.rl |")


def test_a_model_that_transformers_computes_otherwise_is_refused(model, tmp_path, monkeypatch):
    """The gate is real: with a window off by one on our side, the logits differ and nothing is published."""
    from dataclasses import replace

    from stages.model import parity

    ours = parity._ours
    monkeypatch.setattr(parity, "_ours", lambda f, c, s: ours(f, replace(c, sliding_window=c.sliding_window - 1), s))
    with pytest.raises(CuveeError, match="logits differ from transformers'"):
        huggingface.run(huggingface.Config(), {"model": model}, tmp_path, tiny.context(tmp_path / "scratch"))
    assert not (tmp_path / "parity.json").exists()
