"""Raw text to a corpus: read the sources, run the blocks one after the other, write what stays and what went.

A block is a file of stages/data/blocks. It defines `clean(document, config) -> str`, which sees one document at a
time, or `select(documents, config) -> list[str]`, which compares them; either returns why a document goes, or "".
Its own options are its `Config`, here under `options.<block>`; a `check(config)` may refuse them.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.data.document import Document
from stages.data.source import Source, find
from stages.stage import Artifact, ConfigError, Context, CuveeError, Input, Kind, names, option, placement, resolve

VERSION = "1"
INPUTS: dict[str, Input] = {}
OUTPUT = Kind.CORPUS
BLOCKS = ["encoding", "html", "language", "quality", "exact", "minhash", "split", "decontaminate"]
COLUMNS = ["id", "text", "domain", "language", "source"]
SHARD = 256 << 20  # bytes of text in one Parquet file
EXAMPLES = 3  # removed documents shown in the table, a block
Removed = list[tuple[Document, str, str]]  # with block and reason

_CONFIGS = {name: getattr(resolve("data/blocks", name), "Config", None) for name in names("data/blocks")}
BlockOptions = dataclasses.make_dataclass(
    "BlockOptions",
    [(name, kind, option(kind, f"options of the block {name}")) for name, kind in _CONFIGS.items() if kind],
)


@dataclasses.dataclass
class Config:
    sources: list[str] = placement(["stdlib", "cldr"], "files, folders, s3:// prefixes, stdlib, cldr; the first wins")
    benchmarks: list[str] = placement([], "sources that training documents must not overlap with")
    source_bytes: int = option(0, "largest amount taken of a source, in bytes; 0 = all")
    source_documents: int = option(0, "largest number of documents taken of a source; 0 = all")
    seed: int = option(0, "decides which files of a limited source are taken")
    blocks: list[str] = option(BLOCKS, "what the documents go through, in this order", choices="data/blocks")
    options: BlockOptions = option(BlockOptions, "options of the blocks")


def check(config: Config, inputs: dict[str, Any]) -> None:
    """Raises ConfigError for no sources, negative limits, or blocks in an order that cannot work."""
    if not config.sources:
        raise ConfigError(f"sources: is empty; name a folder, or {', '.join(names('data/sources'))}")
    for field in ("source_bytes", "source_documents"):
        if getattr(config, field) < 0:
            raise ConfigError(f"{field}: {getattr(config, field)} is negative; give a limit, or 0 for all")
    blocks = config.blocks
    if twice := [name for name in blocks if blocks.count(name) > 1]:
        raise ConfigError(f"blocks: {twice[0]!r} stands there twice; name a block once")
    if "split" not in blocks:
        raise ConfigError("blocks: 'split' is missing; without it there is no held-out text")
    if "decontaminate" in blocks[: blocks.index("split")]:
        raise ConfigError("blocks: 'decontaminate' stands before 'split'; put it after")
    for name in blocks:
        if hasattr(module := resolve("data/blocks", name), "check"):
            module.check(getattr(config.options, name))


def external(config: Config) -> dict[str, Any]:
    """The identity of the content of all sources and benchmarks: labels, and digests over file names and bytes."""
    return {
        field: [source.identity() for source in _sources(getattr(config, field), config)]
        for field in ("sources", "benchmarks")
    }


def run(config: Config, inputs: dict[str, Artifact], out: Path, ctx: Context) -> dict[str, float]:
    """Writes train-, heldout-, removed-*.parquet and table.json. Raises CuveeError when nothing is left to train on."""
    documents = _read(config.sources, config) + _read(config.benchmarks, config, split="benchmark")
    removed: Removed = []
    steps = []
    blocks: list[tuple[str, Callable[[list[Document]], list[str]]]] = [("read", lambda found: [d.fault for d in found])]
    blocks += [(name, _block(name, config)) for name in config.blocks]
    for name, apply in blocks:
        kept = []
        for document, reason in zip(documents, apply(documents), strict=True):
            if not reason or document.split == "benchmark":
                kept.append(document)
            else:
                removed.append((document, name, reason))
        gone = len(documents) - len(kept)
        documents = kept
        size = sum(_size(document) for document in kept if document.split != "benchmark")
        steps.append({"block": name, "removed": gone, "kept": len(kept), "bytes": size})
        ctx.log(f"{name}: {gone} of {gone + len(kept)} documents removed, {size / 1e6:.2f} MB left")
    kept = [document for document in documents if document.split != "benchmark"]
    if not any(document.split == "train" for document in kept):
        raise _nothing_left(kept, removed)
    if config.options.split.heldout and not any(document.split == "heldout" for document in kept):
        raise CuveeError(f"{len(kept)} documents are left and none could be held out; give at least two "
                         "files (or records) to data.sources, or set data.options.split.heldout=0")
    return _write(kept, removed, steps, out)


def _block(name: str, config: Config) -> Callable[[list[Document]], list[str]]:
    module, options = resolve("data/blocks", name), getattr(config.options, name, None)
    if hasattr(module, "select"):
        return lambda documents: module.select(documents, options)
    return lambda documents: [module.clean(document, options) for document in documents]


def _sources(chosen: list[str], config: Config) -> list[Source]:
    return find(chosen, config.seed, config.source_bytes, config.source_documents)


def _read(chosen: list[str], config: Config, split: str = "") -> list[Document]:
    documents = []
    for source in _sources(chosen, config):
        for document in source.documents():
            document.split = split
            documents.append(document)
    return documents


def _size(document: Document) -> int:
    return len(document.text.encode())


def _nothing_left(kept: list[Document], removed: Removed) -> CuveeError:
    if not removed:
        return CuveeError(f"all {len(kept)} documents were held out and none is left to train on; "
                          "lower data.options.split.heldout or add documents to data.sources")
    worst, count = Counter(block for _, block, _ in removed).most_common(1)[0]
    reason = Counter(_rule(reason) for _, block, reason in removed if block == worst).most_common(1)[0][0]
    mend = "give text, code, HTML, Parquet, or JSON lines with a field 'text'"
    if worst != "read":
        mend = (f"add documents to data.sources, loosen data.options.{worst}, or leave it out of "
                "data.blocks")
    return CuveeError(f"no document is left to train on; block {worst!r} removed {count} of "
                      f"{len(kept) + len(removed)}, most for {reason!r}; {mend}")


def _rule(reason: str) -> str:
    """The part of a reason that many documents share."""
    return reason.partition(":")[0]


def _write(kept: list[Document], removed: Removed, steps: list[dict], out: Path) -> dict[str, float]:
    rows: dict[tuple, list[int]] = {}
    examples: dict[str, list[dict]] = {}
    for split in ("train", "heldout"):
        _parquet([_row(document) for document in kept if document.split == split], split, out)
    for document in kept:
        _count(rows, document, document.split, "")
    for document, block, reason in removed:
        _count(rows, document, block, _rule(reason))
        if len(found := examples.setdefault(block, [])) < EXAMPLES:
            found.append({"id": document.id, "reason": reason, "text": document.text[:200]})
    _parquet([_row(document) | {"block": block, "reason": why} for document, block, why in removed], "removed", out)
    counted = ("source", "domain", "language", "outcome", "rule", "documents", "bytes")
    table = {
        "blocks": steps,
        "rows": [dict(zip(counted, (*key, *value), strict=True)) for key, value in sorted(rows.items())],
        "removed_examples": examples,
    }
    (out / "table.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", "utf-8")
    metrics: dict[str, float] = {"documents_removed": len(removed)}
    for split in ("train", "heldout"):
        part = [document for document in kept if document.split == split]
        metrics |= {f"documents_{split}": len(part), f"bytes_{split}": sum(map(_size, part))}
    return metrics


def _count(rows: dict[tuple, list[int]], document: Document, outcome: str, rule: str) -> None:
    total = rows.setdefault((document.source, document.domain, document.language, outcome, rule), [0, 0])
    total[0] += 1
    total[1] += _size(document)


def _row(document: Document) -> dict[str, str]:
    return {name: getattr(document, name) for name in COLUMNS}


def _parquet(rows: list[dict[str, str]], name: str, out: Path) -> None:
    """`<name>-00000.parquet` and so on; the first file is there even without rows."""
    import pyarrow
    import pyarrow.parquet

    columns = [*COLUMNS, "block", "reason"] if name == "removed" else COLUMNS
    schema = pyarrow.schema([(column, pyarrow.string()) for column in columns])
    shards: list[list[dict[str, str]]] = [[]]
    size = 0
    for row in rows:
        size += len(row["text"])
        if size > SHARD and shards[-1]:
            shards.append([])
            size = len(row["text"])
        shards[-1].append(row)
    for i, shard in enumerate(shards):
        table = pyarrow.Table.from_pylist(shard, schema)
        pyarrow.parquet.write_table(table, out / f"{name}-{i:05d}.parquet", compression="zstd")
