"""Reading checkpoint folders (Hugging Face layout) one tensor at a time, and telling whether two belong together."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.stage import CuveeError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
# What may differ between two checkpoints of one architecture: who wrote the file, not what the model is.
INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}


class Checkpoint:
    """A folder with `config.json`, safetensors and tokenizer files. Tensors are read when asked for.

    layout: tensor name -> file name. Raises CuveeError if the folder holds no readable weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = read_json(path / "config.json")
        self.layout = self._layout()
        self._open: dict[str, Any] = {}

    def _layout(self) -> dict[str, str]:
        from safetensors import SafetensorError, safe_open

        if (self.path / INDEX).exists():
            return dict(sorted(read_json(self.path / INDEX)["weight_map"].items()))
        try:
            with safe_open(self.path / "model.safetensors", framework="pt") as file:
                return dict.fromkeys(sorted(file.keys()), "model.safetensors")
        except (FileNotFoundError, SafetensorError) as error:
            raise CuveeError(
                f"{self.path / 'model.safetensors'} can't be read ({error}); expected a checkpoint folder "
                "with safetensors weights, so make this artifact again"
            ) from None

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor `key` as stored (its own shape and dtype), on the CPU."""
        from safetensors import safe_open

        name = self.layout[key]
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, framework="pt")
        return self._open[name].get_tensor(key)

    @property
    def tied(self) -> bool:
        """Whether output and input embeddings are one matrix (Cohere2's default)."""
        return bool(self.config.get("tie_word_embeddings", True))


def copy_model(source: Path, out: Path, weights: bool = True) -> None:
    """Copy the model in the folder `source` to `out`: its configuration, its tokenizer and, asked for, its weights, without
    what a stage left beside it (rollouts, the record of a choice)."""
    from stages.model.folder import TOKENIZER_FILES

    names = {"config.json", "generation_config.json", INDEX, *TOKENIZER_FILES}
    for name in sorted(names | (set(Checkpoint(source).layout.values()) if weights else set())):
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CuveeError naming the file if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CuveeError(f"{path} can't be read ({error}); make this artifact again") from None


def digest(path: Path) -> str:
    """SHA-256 over name and bytes of the file; of nothing where there is none."""
    told = path.name.encode() + b"\0" + path.read_bytes() if path.exists() else b""
    return hashlib.sha256(told).hexdigest()


def tokenizer_digests(folder: Path) -> dict[str, str]:
    """Digests of the vocabulary ("tokenizer") and of what turns messages into text ("template") in `folder`."""
    settings = folder / "tokenizer_config.json"
    template = folder / "chat_template.jinja"
    named = read_json(settings).get("chat_template") if settings.exists() else None
    text = template.read_text(encoding="utf-8") if template.exists() else named or ""
    text = text if isinstance(text, str) else json.dumps(text)
    return {"tokenizer": digest(folder / "tokenizer.json"), "template": hashlib.sha256(text.encode()).hexdigest()}


def require_same(models: dict[str, Checkpoint]) -> None:
    """Raises CuveeError with the first difference in configuration, tensors or tokenizer between `models`."""
    (first, a), *others = models.items()
    for name, b in others:
        for key in sorted((a.config.keys() | b.config.keys()) - INCIDENTAL):
            if a.config.get(key) != b.config.get(key):
                raise CuveeError(
                    f"{name}'s config.json has {key}={b.config.get(key)!r} but {first}'s has {a.config.get(key)!r}; "
                    "only models of one architecture can be merged"
                )
        if odd := sorted(a.layout.keys() ^ b.layout.keys()):
            holder = first if odd[0] in a.layout else name
            raise CuveeError(
                f"{len(odd)} tensors are not in both {first} and {name}, the first being {odd[0]} (only in {holder}); "
                "only models of one architecture can be merged"
            )
        mine, other = tokenizer_digests(a.path), tokenizer_digests(b.path)
        for part in mine:
            if mine[part] != other[part]:
                raise CuveeError(
                    f"{name} and {first} have different {part}s ({other[part][:12]} and {mine[part][:12]}); "
                    "merge only models trained with one tokenizer and one chat template"
                )
