"""Corpus to tokens: Megatron's indexed files, one a split and domain, every document beginning with BOS."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.data import corpus
from stages.stage import Artifact, ConfigError, Context, CuveeError, Input, Kind, option

VERSION = "1"
INPUTS = {
    "corpus": Input(Kind.CORPUS),
    "tokenizer": Input(Kind.TOKENIZER),
    "prompts": Input(Kind.PROMPTS, many=True, optional=True),
}
OUTPUT = Kind.TOKENS
INSTRUCTIONS = "instructions"  # the domain of rendered prompts
BATCH = 256  # documents encoded at once


@dataclass
class Config:
    vocab_multiple: int = option(128, "the model's vocabulary is padded to a multiple of this")
    prompts_repeat: int = option(1, "times that each training prompt, with its answer, is put into the training split")


def check(config: Config, inputs: dict[str, Any]) -> None:
    """Raises ConfigError for a multiple below 1 or a negative repetition."""
    if config.vocab_multiple < 1:
        raise ConfigError(f"vocab_multiple: {config.vocab_multiple} is below 1; 128 suits GPUs")
    if config.prompts_repeat < 0:
        raise ConfigError(f"prompts_repeat: {config.prompts_repeat} is negative; 0 leaves prompts out")


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Writes `<split>-<domain>.bin/.idx`, tokens.json and the tokenizer's files under tokenizer/."""
    from tokenizers import Tokenizer

    from stages.data.indexed import write

    source: Artifact = inputs["corpus"]
    folder: Path = inputs["tokenizer"].path
    shutil.copytree(folder, out / "tokenizer", ignore=shutil.ignore_patterns("record.json"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # a special token's name inside a document is text
    vocab_size = -(-tokenizer.get_vocab_size() // config.vocab_multiple) * config.vocab_multiple
    splits: dict[str, dict[str, dict[str, int]]] = {}
    for split in ("train", "heldout"):
        texts: dict[str, list[str]] = {}
        for document in corpus.documents(source.path, split):
            texts.setdefault(document["domain"], []).append(document["text"])
        counts = {
            domain: write(out / f"{split}-{domain}", _encode(tokenizer, found), vocab_size)
            for domain, found in sorted(texts.items())
        }
        if split == "train" and (prompts := inputs.get("prompts")) and config.prompts_repeat:
            rendered = _rendered(folder, prompts, config)
            counts[INSTRUCTIONS] = write(out / f"{split}-{INSTRUCTIONS}", rendered, vocab_size)
        splits[split] = {domain: {"documents": n, "tokens": total} for domain, (n, total) in counts.items()}
        ctx.log(f"{split}: " + ", ".join(f"{domain} {n['tokens']:,} tokens" for domain, n in splits[split].items()))
    table = {"vocab_size": vocab_size, "splits": splits}
    (out / "tokens.json").write_text(json.dumps(table, indent=1) + "\n")
    return {f"tokens_{split}": sum(n["tokens"] for n in found.values()) for split, found in splits.items()}


def _encode(tokenizer: Any, texts: list[str]) -> Iterator[list[int]]:
    """Ids of each text; its post-processor puts BOS in front."""
    for start in range(0, len(texts), BATCH):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + BATCH]):
            yield encoding.ids


def _rendered(folder: Path, prompts: dict[str, Artifact], config: Config) -> Iterator[list[int]]:
    """Ids of each training conversation, the answer as the assistant's turn, `prompts_repeat` times over."""
    from transformers import AutoTokenizer

    from stages.chat.render import render

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for name, artifact in sorted(prompts.items()):
        for prompt in corpus.prompts(artifact.path, "train"):
            ids = render(tokenizer, [*prompt["messages"], {"role": "assistant", "content": prompt["answer"]}]).ids
            if ids[:1] != [tokenizer.bos_token_id]:
                raise CuveeError(f"data.tokens: prompt {prompt['id']} of {name} does not begin with "
                                 f"{tokenizer.bos_token}; the tokenizer's chat template must write it")
            found.append(ids)
    yield from found * config.prompts_repeat
