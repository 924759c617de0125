"""Publish a checkpoint in Hugging Face's format, gated on logit parity with transformers' own model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.stage import Artifact, Context, Estimate, Input, Kind, option

VERSION = "3"
INPUTS = {"model": Input(Kind.CHECKPOINT)}
OUTPUT = Kind.EXPORT


@dataclass
class Config:
    license: str = option("other", "license in the model card's front matter")
    dtype: str = option("float32", "format of the weights", ("float32", "bfloat16"))


def estimate(config: Config, inputs: dict[str, Any]) -> Estimate:
    return Estimate(parameters=inputs["model"].parameters)


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Copy the folder, in `dtype`; compare its logits on sequences longer than the window, and say in README.md how it was made.

    Writes parity.json beside the model's files. Raises CuveeError, and publishes nothing, above the allowed difference.
    """
    from stages.merge.checkpoint import copy_model
    from stages.model import parity
    from stages.model.folder import read_config

    model: Artifact = inputs["model"]
    copy_model(model.path, out, weights=config.dtype == "float32")
    if config.dtype != "float32":
        cast(model.path, out, config.dtype)
    _generation(out)
    found = parity.check(out, ctx)
    (out / "parity.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (out / "README.md").write_text(_readme(model, config.license, read_config(out).family, found), encoding="utf-8")
    return found


def cast(source: Path, out: Path, dtype: str) -> None:
    """Write `source`'s weights and config.json to `out` in `dtype`, in place of any that lie there."""
    import torch

    from stages.merge.checkpoint import read_json
    from stages.model import weights

    for path in [*out.glob("*.safetensors"), out / weights.INDEX]:
        path.unlink(missing_ok=True)
    found = weights.Folder(source)
    shapes = {name: found.shape(name) for name in found}
    weights.write(out, shapes, found.items(), getattr(torch, dtype))
    config = read_json(source / "config.json") | {"dtype": dtype}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _generation(out: Path) -> None:
    """generation_config.json: greedy, ending at the end of the assistant's turn."""
    from transformers import AutoTokenizer

    from stages.merge.checkpoint import read_json

    path, tokenizer = out / "generation_config.json", AutoTokenizer.from_pretrained(out)
    found = read_json(path) if path.exists() else {}
    found |= {"do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    for name in ("bos", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            found[f"{name}_token_id"] = token
    path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _readme(model: Artifact, license: str, family: str, parity: dict[str, float]) -> str:
    """The card of what is known before evaluation: how the weights came to be. The report's card adds the scores."""
    from stages.report.card import front_matter, limits_of, recipe, steps

    chain = recipe(model.record, model.record.get("ancestors", {}))
    parts = [
        front_matter(license, None, family, chain),
        f"# {model.record['name']}\n",
        f"A decoder with the {family} architecture, address `{model.fingerprint}`. Its report holds the evaluation.\n",
        "## How it was made\n",
        steps(chain),
        "## Use\n",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")\nmodel = AutoModelForCausalLM.from_pretrained(".")\n'
        'messages = [{"role": "user", "content": "Hello"}]\n'
        'options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}\n'
        "inputs = tokenizer.apply_chat_template(messages, **options)\n"
        'print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0][inputs["input_ids"].shape[1]:]))\n```\n',
        "## Limits\n",
        limits_of(parity),
    ]
    return "\n".join(parts)
