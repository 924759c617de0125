"""A CHECKPOINT folder's files besides the weights: config.json, generation_config.json and the tokenizer."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.model.config import ModelConfig
from stages.stage import CuveeError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


def read_config(folder: Path) -> ModelConfig:
    """The sizes in `folder`/config.json. Raises CuveeError if it is missing, broken or of another architecture."""
    path = folder / "config.json"
    try:
        return ModelConfig.from_hf(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CuveeError(
            f"{path} can't be read ({error!r}); expected a model folder, make this artifact again"
        ) from None


def token_ids(tokenizer: Path) -> dict[str, int]:
    """bos_token_id, eos_token_id, pad_token_id as far as tokenizer_config.json names these tokens."""
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    found = {}
    for name in ("bos", "eos", "pad"):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and (number := vocabulary.token_to_id(token)) is not None:
            found[f"{name}_token_id"] = number
    return found


def check_vocabulary(tokenizer: Path, config: ModelConfig) -> None:
    """Raises CuveeError without a tokenizer in `tokenizer`, or where it knows more tokens than the model has rows."""
    from tokenizers import Tokenizer

    if not (tokenizer / "tokenizer.json").exists():
        raise CuveeError(f"{tokenizer / 'tokenizer.json'} does not exist; expected a tokenizer's folder")
    size = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
    if size > config.vocab_size:
        raise CuveeError(
            f"model.vocab_size: {config.vocab_size} rows cannot hold the tokenizer's {size} tokens; raise it to at least {size}"
        )


def write(out: Path, config: ModelConfig, tokenizer: Path) -> None:
    """Write config.json, generation_config.json and copies of the tokenizer's files to `out`."""
    ids = token_ids(tokenizer)
    # transformers takes the ids of another model for absent ones; null says that there is none.
    absent = {f"{name}_token_id": None for name in ("bos", "eos", "pad")}
    _write_json(out / "config.json", config.to_hf() | absent | ids)
    _write_json(out / "generation_config.json", ids)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, out / name)


@contextmanager
def full_disk_is_oserror(path: Path) -> Iterator[None]:
    """torch and safetensors report a full disk under `path` as errors of their own; raise OSError ENOSPC for them."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if "os error 28" not in str(error) and shutil.disk_usage(path).free > 1 << 20:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
