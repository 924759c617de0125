"""Raw text to a corpus: read the sources, run the blocks one after the other, write what stays and what went.

A block is a file of stages/data/blocks. Documents go through it in batches; it gives a reason to remove each, or "":

    clean(document, config) -> str              sees one document, which it may change
    filter(documents, config) -> list[str]      the same for a batch, where that is faster

or, if it must see everything:

    keys(documents, config) -> rows             structured array: `document`, its place in the batch, and what is compared
    join(keys, config, state)                   all rows of the corpus to arrays of `state`, see stages/data/join.py;
                                                "removed", bool [documents], hides documents from the joins that follow
    apply(documents, places, config, state) -> list[str]    the verdicts, by places in the corpus

Its own options are its `Config`, here under `options.<block>`; a `check(config)` may refuse them. Of those made with `at_least`
or `at_most` (stages/data/thresholds.py), table.json shows how many documents, and which, go at a looser or stricter value.
`LIBRARIES` names what decides a block's outcome by its release, `PRIVATE` says that what it takes out is not to be shown.
"""

import dataclasses
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stages.data import engine, thresholds
from stages.data.engine import Plan
from stages.data.shard import EXAMPLES
from stages.data.source import Source, find
from stages.stage import Artifact, ConfigError, Context, CuveeError, Input, Kind, names, option, placement, resolve

VERSION = "5"
COUNTS = ("removed", "kept", "changed", "bytes")  # documents that a block removed, kept, changed; bytes that it kept
INPUTS = {"labels": Input(Kind.CORPUS, optional=True)}  # of data.judge, for the classifier
OUTPUT = Kind.CORPUS
BLOCKS = ["encoding", "html", "language", "quality", "exact", "minhash", "split", "decontaminate"]
ORDER = [  # (first, then, why)
    ("exact", "substring", "and would take whole documents to pieces"),
    ("minhash", "substring", "and would take whole documents to pieces"),
    ("imports", "split", "after which the files of a repository may be on both sides"),
    ("execute", "imports", "which makes one document of many files"),
    ("substring", "split", "after which the first of a passage may be on the other side"),
    ("split", "decontaminate", "which decides what is protected"),
    ("exact", "lines", "and would take every line of a page that is there ten times"),
    ("minhash", "lines", "and would take every line of a page that is there ten times"),
    ("classifier", "split", "after which the classifier finds no document to sample"),
    ("safety", "split", "after which it finds no document to sample"),
]

_CONFIGS = {name: getattr(resolve("data/blocks", name), "Config", None) for name in names("data/blocks")}
BlockOptions = dataclasses.make_dataclass(
    "BlockOptions",
    [(name, kind, option(kind, f"options of the block {name}")) for name, kind in _CONFIGS.items() if kind],
)


@dataclasses.dataclass
class Config:
    sources: list[str] = placement(["stdlib", "cldr"], "files, folders, s3:// and hf:// prefixes, stdlib, cldr; the first wins")
    existing: list[str] = placement([], "corpora made before; exact, minhash and url don't take again what they hold")
    benchmarks: list[str] = placement([], "sources that training documents must not overlap with")
    source_bytes: int = option(0, "largest amount taken of a source, in bytes; 0 = all")
    source_documents: int = option(0, "largest number of documents taken of a source; 0 = all")
    seed: int = option(0, "decides which files of a limited source are taken")
    blocks: list[str] = option(BLOCKS, "what the documents go through, in this order", choices="data/blocks")
    executor: str = placement("local", "where shards run: a file of stages/data/executors (local, ray)")
    workers: int = placement(0, "processes; 0 = as many as the stage has threads, or the Ray cluster has CPUs")
    options: BlockOptions = option(BlockOptions, "options of the blocks")


def check(config: Config, inputs: dict[str, Any]) -> None:
    """Raises ConfigError for no sources, negative limits, or blocks in an order that cannot work."""
    if not config.sources:
        raise ConfigError(f"sources: is empty; name a folder, or {', '.join(names('data/sources'))}")
    for field in ("source_bytes", "source_documents", "workers"):
        if getattr(config, field) < 0:
            raise ConfigError(f"{field}: {getattr(config, field)} is negative; give a count, or 0 for all")
    blocks = config.blocks
    if twice := [name for name in blocks if blocks.count(name) > 1]:
        raise ConfigError(f"blocks: {twice[0]!r} stands there twice; name a block once")
    if "split" not in blocks:
        raise ConfigError("blocks: 'split' is missing; without it there is no held-out text")
    for first, then, why in ORDER:
        if {first, then} <= set(blocks) and blocks.index(then) < blocks.index(first):
            raise ConfigError(f"blocks: {then!r} stands before {first!r}, {why}; put it after")
    for name in blocks:
        if hasattr(module := resolve("data/blocks", name), "check"):
            module.check(getattr(config.options, name))
    learns = config.options.classifier
    if "classifier" in blocks and not (learns.good or learns.labels or "labels" in inputs):
        raise ConfigError("options.classifier.good: is empty, and so is labels; name files with documents as they should be, or leave "
                          "out the block")


def external(config: Config) -> dict[str, Any]:
    """The identity of the content of all sources and benchmarks: labels, and digests over file names and bytes."""
    found = {
        field: [source.identity() for source in _sources(config, field)]
        for field in ("sources", "benchmarks")
    }
    if config.existing:
        found["existing"] = [source.identity() for source in _existing(config)]
    for name in config.blocks:
        if hasattr(module := resolve("data/blocks", name), "external"):
            found[name] = module.external(getattr(config.options, name))
    return found | {"libraries": _libraries(config.blocks)}


def _libraries(blocks: list[str]) -> dict[str, str]:
    """Versions of the libraries whose releases decide what the blocks and the formats make of a text."""
    modules = [resolve("data/blocks", name) for name in blocks]
    modules += [resolve("data/formats", name) for name in names("data/formats")]
    return {name: version(name) for name in sorted({name for module in modules for name in getattr(module, "LIBRARIES", ())})}


def run(config: Config, inputs: dict[str, Artifact], out: Path, ctx: Context) -> dict[str, float]:
    """Writes train-, heldout-, removed-*.parquet, table.json, samples.json (the documents of the table, for MLflow) and
    decontaminated.json. Raises CuveeError when nothing is left to train on.
    """
    if "labels" in inputs:
        config.options.classifier.labels = [str(inputs["labels"].path)]
    shards = [shard for source in _existing(config) for shard in source.shards("existing")]
    shards += [shard for source in _sources(config, "sources") for shard in source.shards("")]
    shards += [shard for source in _sources(config, "benchmarks") for shard in source.shards("benchmark")]
    plan = Plan({name: getattr(config.options, name, None) for name in config.blocks}, shards, ctx.scratch / "curate")
    start, workers = engine.executor(config, ctx)
    table = _table(config.blocks, engine.curate(plan, start, workers, ctx.log))
    for step in table["blocks"]:
        removed, kept = step["removed"], step["kept"]
        ctx.log(f"{step['block']}: {removed} of {removed + kept} documents removed, {step['bytes'] / 1e6:.2f} MB left")
    total = {"train": [0, 0], "heldout": [0, 0]}
    for row in table["rows"]:
        if found := total.get(row["outcome"]):
            found[:] = found[0] + row["documents"], found[1] + row["bytes"]
    if not total["train"][0]:
        raise _nothing_left(total["heldout"][0], table["rows"])
    if config.options.split.heldout and not total["heldout"][0]:
        raise CuveeError(f"{total['train'][0]} documents are left and none could be held out; give at least two "
                         "files (or records) to data.sources, or set data.options.split.heldout=0")
    engine.publish(plan, out)
    against = _decontaminated(config)
    for name, value in (("table", table), ("samples", _samples(table)), ("decontaminated", against)):
        (out / f"{name}.json").write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
    metrics: dict[str, float] = {"documents_removed": sum(step["removed"] for step in table["blocks"]), "decontaminated_suites": len(against["suites"])}
    for split, (documents, volume) in total.items():
        metrics = {f"documents_{split}": documents, f"bytes_{split}": volume} | metrics
    return metrics | {f"{field}/{step['block']}": step[field] for step in table["blocks"] for field in COUNTS}


def _decontaminated(config: Config) -> dict[str, Any]:
    """Against what the training split was decontaminated, for an evaluation to look its suite up in.

    suites: label, file and digest (SHA-256 of its bytes; of a bucket, the ETag) of every benchmark's file. ngrams, minhash:
    the options of the blocks that compared with them, None where a block did not run. heldout: whether the n-grams of the
    held-out split were kept out as well.
    """
    ran = {name: dataclasses.asdict(getattr(config.options, name)) for name in ("decontaminate", "minhash") if name in config.blocks}
    suites = [{"label": source.label, "file": entry.name, "digest": entry.digest()}
              for source in _sources(config, "benchmarks") for entry in source.entries]  # fmt: skip
    return {"suites": suites if ran else [], "ngrams": ran.get("decontaminate"), "minhash": ran.get("minhash"), "heldout": "decontaminate" in ran}


def _sources(config: Config, field: str) -> list[Source]:
    return find(getattr(config, field), config.seed, config.source_bytes, config.source_documents, f"data.{field}")


def _existing(config: Config) -> list[Source]:
    """The training splits of corpora made before."""
    found = find(config.existing, field="data.existing")
    for source, name in zip(found, config.existing, strict=True):
        source.entries = [entry for entry in source.entries if entry.name.startswith("train-") and entry.kind == ".parquet"]
        if not source.entries:
            raise ConfigError(f"existing: {name!r} holds no train-*.parquet; name the folder of a corpus")
    return found


def _table(blocks: list[str], counted: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of all shards and passes as one: blocks in order, rows by source and outcome, examples removed."""
    steps = {name: {"block": name, **dict.fromkeys(COUNTS, 0)} for name in ["read", *blocks]}
    rows: dict[tuple, list[int]] = {}
    examples: dict[str, dict[str, list[dict]]] = {"examples": {}, "changed": {}}
    for one in counted:
        for name, values in one["steps"].items():
            for field, value in zip(COUNTS, values, strict=True):
                steps[name][field] += value
        for *key, documents, volume in one["rows"]:
            total = rows.setdefault(tuple(key), [0, 0])
            rows[tuple(key)] = [total[0] + documents, total[1] + volume]
        for kind, found in examples.items():
            for name, some in one[kind].items():
                found[name] = (found.get(name, []) + some)[:EXAMPLES]
    for name in (name for name in examples["changed"] if getattr(engine.block(name), "PRIVATE", False)):
        examples["changed"][name] = [one | {"before": ""} for one in examples["changed"][name]]
    names = ("source", "domain", "language", "outcome", "rule", "documents", "bytes")
    return {
        "blocks": list(steps.values()),
        "rows": [dict(zip(names, (*key, *value), strict=True)) for key, value in sorted(rows.items())],
        "thresholds": thresholds.merge(row for one in counted for row in one["thresholds"]),
        "removed_examples": {name: examples["examples"][name] for name in steps if name in examples["examples"]},
        "changed_examples": {name: examples["changed"][name] for name in steps if name in examples["changed"]},
    }


def _samples(table: dict[str, Any]) -> dict[str, list[Any]]:
    """Column -> values: the removed and changed documents of the table, and those next to a threshold."""
    rows = [(block, one["reason"], one["id"], one["text"]) for block, some in table["removed_examples"].items() for one in some]
    rows += [(block, "changed", one["id"], f"{one['before']}\n→\n{one['after']}") for block, some in table["changed_examples"].items() for one in some]
    for row in table["thresholds"]:
        falls = ", ".join(f"{count} at {value:g}" for value, count in row["removed"])
        head = f"{row['option']} {row['threshold']:g}; of {row['documents']} documents go {falls}"
        rows += [(row["block"], f"{head}; turns at {one['value']:g}: {one['reason']}", one["id"], one["text"]) for one in row["nearest"]]
    return dict(zip(("block", "why", "id", "text"), map(list, zip(*rows, strict=True)), strict=True)) if rows else {}


def _nothing_left(heldout: int, rows: list[dict[str, Any]]) -> CuveeError:
    removed = Counter()
    for row in rows:
        if row["outcome"] not in ("train", "heldout"):
            removed[row["outcome"], row["rule"]] += row["documents"]
    if not removed:
        return CuveeError(f"all {heldout} documents were held out and none is left to train on; "
                          "lower data.options.split.heldout or add documents to data.sources")
    by_block = Counter()
    for (block, _), count in removed.items():
        by_block[block] += count
    worst, count = by_block.most_common(1)[0]
    reason = max((n, reason) for (block, reason), n in removed.items() if block == worst)[1]
    mend = "give text, code, HTML, Parquet, or JSON lines with a field 'text'"
    if worst != "read":
        mend = (f"add documents to data.sources, loosen data.options.{worst}, or leave it out of "
                "data.blocks")
    return CuveeError(f"no document is left to train on; block {worst!r} removed {count} of "
                      f"{heldout + removed.total()}, most for {reason!r}; {mend}")
