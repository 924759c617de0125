"""Corpus to tokens: Megatron's indexed files, one a split and domain, every document beginning with BOS."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stages.data import corpus, indexed
from stages.data.encoder import Encoder
from stages.data.engine import executor
from stages.data.shard import commit
from stages.stage import Artifact, ConfigError, Context, CuveeError, Input, Kind, option, placement

VERSION = "2"
INPUTS = {
    "corpus": Input(Kind.CORPUS),
    "tokenizer": Input(Kind.TOKENIZER),
    "prompts": Input(Kind.PROMPTS, many=True, optional=True),
}
OUTPUT = Kind.TOKENS
INSTRUCTIONS = "instructions"  # the domain of rendered prompts
SPLITS = ("train", "heldout")
BATCH = 256  # documents encoded at once
NO_NAME = re.compile(r"[^\w.-]")  # what the name of a metric may not hold


@dataclass
class Config:
    vocab_multiple: int = option(128, "the model's vocabulary is padded to a multiple of this")
    prompts_repeat: int = option(1, "times that each training prompt, with its answer, is put into the training split")
    executor: str = placement("local", "where files run: a file of stages/data/executors (local, ray)")
    workers: int = placement(0, "processes; 0 = as many as the stage has threads, or the Ray cluster has CPUs")


def check(config: Config, inputs: dict[str, Any]) -> None:
    """Raises ConfigError for a multiple below 1 or a negative repetition."""
    if config.vocab_multiple < 1:
        raise ConfigError(f"vocab_multiple: {config.vocab_multiple} is below 1; 128 suits GPUs")
    if config.workers < 0:
        raise ConfigError(f"workers: {config.workers} is negative; give a count, or 0 for all threads")
    if config.prompts_repeat < 0:
        raise ConfigError(f"prompts_repeat: {config.prompts_repeat} is negative; 0 leaves prompts out")


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Writes `<split>-<domain>.bin/.idx`, tokens.json (documents and tokens by split and domain; by source of the training
    split, with the epochs that the mixture makes of each) and the tokenizer's files under tokenizer/."""
    source: Artifact = inputs["corpus"]
    folder: Path = inputs["tokenizer"].path
    shutil.copytree(folder, out / "tokenizer", ignore=shutil.ignore_patterns("record.json"))
    vocab_size = _vocab_size(folder, config.vocab_multiple)
    files = sorted(path for split in SPLITS for path in source.path.glob(f"{split}-*.parquet"))
    parts = ctx.scratch / "tokens"
    parts.mkdir(exist_ok=True)
    todo = [i for i, file in enumerate(files) if not (parts / f"{file.stem}.json").exists()]
    start, workers = executor(config, ctx)
    work = partial(_encode_file, files, folder / "tokenizer.json", vocab_size, parts)
    with start(work, min(workers, len(files))) as each:
        for done, _ in enumerate(each(0, todo), 1):
            if len(todo) > 20 and done % (len(todo) // 10) == 0:
                ctx.log(f"{done} of {len(todo)} files")
    splits: dict[str, dict[str, dict[str, int]]] = {}
    sources: dict[str, dict[str, float]] = {}
    for split in SPLITS:
        found: dict[str, list[Path]] = {}
        for file in files:
            if file.stem.startswith(f"{split}-"):
                told = json.loads((parts / f"{file.stem}.json").read_text())
                for domain in told["domains"]:
                    found.setdefault(domain, []).append(parts / f"{file.stem}-{domain}")
                for name, counts in told["sources"].items() if split == "train" else []:
                    one = sources.setdefault(name, dict.fromkeys(counts, 0))
                    sources[name] = {field: one[field] + count for field, count in counts.items()}
        counts = {domain: indexed.merge(out / f"{split}-{domain}", found[domain]) for domain in sorted(found)}
        if split == "train" and (prompts := inputs.get("prompts")) and config.prompts_repeat:
            rendered = _rendered(folder, prompts, config)
            counts[INSTRUCTIONS] = indexed.write(out / f"{split}-{INSTRUCTIONS}", rendered, vocab_size)
        splits[split] = {domain: {"documents": n, "tokens": total} for domain, (n, total) in counts.items()}
        ctx.log(f"{split}: " + ", ".join(f"{domain} {n['tokens']:,} tokens" for domain, n in splits[split].items()))
    for name, one in sources.items():
        one["epochs"] = round(one["tokens"] / max(one.pop("different_tokens"), 1), 3)
        ctx.log(f"{name}: {one['tokens']:,} tokens, {one['epochs']:g} epochs")
    table = {"vocab_size": vocab_size, "splits": splits, "sources": sources}
    (out / "tokens.json").write_text(json.dumps(table, indent=1) + "\n")
    return {f"tokens_{split}": sum(n["tokens"] for n in found.values()) for split, found in splits.items()} | {
        f"{field}/{NO_NAME.sub('_', name)}": one[field] for name, one in sources.items() for field in ("tokens", "epochs")}  # fmt: skip


def _vocab_size(folder: Path, multiple: int) -> int:
    from tokenizers import Tokenizer

    return -(-Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() // multiple) * multiple


def _encode_file(files: list[Path], tokenizer_file: Path, vocab_size: int, parts: Path, _: int, number: int) -> None:
    """Tokens of one file of the corpus, by domain; its JSON (the domains, and counts by source) says that all are whole."""
    file, encoder = files[number], Encoder(tokenizer_file)
    writers: dict[str, indexed.Writer] = {}
    sources: dict[str, dict[str, int]] = {}
    before: dict[str, str] = {}
    for rows in _batches(file):
        for domain, found in rows.items():
            if domain not in writers:
                writers[domain] = indexed.Writer(parts / f"{file.stem}-{domain}", vocab_size)
            for row, ids in zip(found, encoder([row["text"] for row in found]), strict=True):
                writers[domain].add(ids)
                one = sources.setdefault(row["source"], {"documents": 0, "tokens": 0, "different_tokens": 0})
                again, before[domain] = row["id"] == before.get(domain), row["id"]  # copies follow one another
                for field, count in (("documents", 1), ("tokens", len(ids)), ("different_tokens", 0 if again else len(ids))):
                    one[field] += count
    for writer in writers.values():
        writer.close()
    commit(parts / f"{file.stem}.json", {"domains": sorted(writers), "sources": sources})


def _batches(file: Path) -> Iterator[dict[str, list[dict[str, str]]]]:
    """BATCH documents after the other by domain, in order."""
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(BATCH, columns=["id", "text", "domain", "source"]):
        found: dict[str, list[dict[str, str]]] = {}
        for row in batch.to_pylist():
            found.setdefault(row["domain"], []).append(row)
        yield found


def _rendered(folder: Path, prompts: dict[str, Artifact], config: Config) -> Iterator[list[int]]:
    """Ids of each training conversation, the answer as the assistant's turn, `prompts_repeat` times over."""
    from transformers import AutoTokenizer

    from stages.chat.render import render_row

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for name, artifact in sorted(prompts.items()):
        for prompt in corpus.prompts(artifact.path, "train"):
            ids = render_row(tokenizer, prompt, prompt["answer"]).ids
            if ids[:1] != [tokenizer.bos_token_id]:
                raise CuveeError(f"data.tokens: prompt {prompt['id']} of {name} does not begin with "
                                 f"{tokenizer.bos_token}; the tokenizer's chat template must write it")
            found.append(ids)
    yield from found * config.prompts_repeat
