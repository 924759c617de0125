"""Curation's engine: documents stream through the blocks in passes over shards; blocks that compare them join in between.

A pass reads a shard in batches, applies what the last joins decided, runs the blocks that need no other document, and
gathers keys for the blocks that do: small rows that are joined over all shards before the next pass; where they are many,
the workers deal them out by their hashes and sort the parts. A shard is written under another name and renamed when it is
whole, and its commit mark is its JSON: a killed run goes on from there. The shards follow from the sources alone, so that the
bytes do not depend on the number of workers. Memory holds a batch and a part of the keys a worker, some bytes a document and
what a join itself compares at once (the lines or the n-grams of held-out text that it looks for, a classifier's sample); the
rest is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from stages.data import join, thresholds
from stages.data.document import Document, size
from stages.data.formats._record import TEXT_FIELDS
from stages.data.join import Keys, State
from stages.data.shard import Writer, commit, read
from stages.stage import Context, CuveeError, resolve

BATCH_BYTES, BATCH_DOCUMENTS = 2 << 20, 1024  # of text: large enough to vectorise over, small enough for the cache

STAYS = ("benchmark", "existing")  # splits that are only there to be compared with


@dataclass(frozen=True)
class Step:
    """One pass: verdicts of earlier joins that are applied, blocks that run, blocks whose keys are gathered."""

    apply: list[str]
    run: list[str]
    keys: list[str]


@dataclass
class Plan:
    """All that a worker needs. options: block -> its Config. shards: what each yields; the order is their priority.

    folder: intermediate files, kept over a crash. share: of the documents, those in the sample for the thresholds.
    """

    options: dict[str, Any]
    shards: list[Any]
    folder: Path
    steps: list[Step] = field(default_factory=list)
    share: float = 1.0

    def __post_init__(self) -> None:
        self.steps = passes(list(self.options))
        sizes = [piece.length for shard in self.shards if shard.split not in STAYS for piece in shard.entries]
        self.share = thresholds.share(sum(sizes))

    def path(self, number: int, shard: int) -> Path:
        return self.folder / f"{number}-{shard:05d}"

    def counts(self, number: int) -> Path:
        return self.folder / f"{number}-counts.npy"

    def left(self, number: int) -> tuple[list[Path], list[int]]:
        """The files of all shards after a pass, and how many documents it left in each."""
        return [self.path(number, shard) for shard in range(len(self.shards))], np.load(self.counts(number)).tolist()

    def joined(self, number: int, block: str) -> Path:
        return self.folder / f"{number}-{block}"


@dataclass
class Operation:
    """A block at work on a shard. judge: its verdicts on documents at their places, with these or other options.

    counts: documents removed, kept, changed, and bytes kept. sample: what thresholds are looked at with.
    """

    name: str
    judge: thresholds.Judge
    options: Any = None
    counts: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    sample: list[thresholds.Seen] = field(default_factory=list)


def block(name: str) -> Any:
    """The module of a block."""
    return resolve("data/blocks", name)


def joins(name: str) -> bool:
    """Whether a block compares documents: it has `keys`, `join` and `apply` in place of `clean` or `filter`."""
    return hasattr(block(name), "join")


def passes(blocks: list[str]) -> list[Step]:
    """The blocks as passes. Joins that follow one another share a pass, unless one reads what another applies."""
    steps, apply, run, keys = [], [], [], []
    for name in blocks:
        if keys and (not joins(name) or getattr(block(name), "AFTER_APPLY", False)):
            steps.append(Step(apply, run, keys))
            apply, run, keys = keys, [], []
        (keys if joins(name) else run).append(name)
    steps.append(Step(apply, run, keys))
    return [*steps, Step(keys, [], [])] if keys else steps


def executor(config: Any, ctx: Context) -> tuple[Callable[..., Any], int]:
    """The `start` of `config.executor`, and the workers; 0 for all CPUs of a cluster."""
    module = resolve("data/executors", config.executor)
    return module.start, config.workers or (0 if getattr(module, "CLUSTER", False) else ctx.threads)


def curate(plan: Plan, start: Callable[..., Any], workers: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run all passes; what each shard of each pass counted, pass by pass. `start`: an executor's (see executors/)."""
    counted = []
    _fresh(plan)
    with start(partial(_task, plan), min(workers, len(plan.shards))) as each:
        for number, step in enumerate(plan.steps):
            marks = [plan.path(number, shard).with_suffix(".json") for shard in range(len(plan.shards))]
            todo = [shard for shard, mark in enumerate(marks) if not mark.exists()]
            for done, _ in enumerate(each(("shard", number, ""), todo), 1):
                if len(todo) > 20 and done % (len(todo) // 10) == 0:
                    log(f"pass {number + 1} of {len(plan.steps)}: {done} of {len(todo)} shards")
            found = [json.loads(mark.read_text()) for mark in marks]
            counted += found
            np.save(plan.counts(number), [one["documents"] for one in found])
            _join(plan, number, step, each)
            if 0 < number < len(plan.steps) - 1:
                for shard in range(len(plan.shards)):  # what the next pass reads is whole: the one before can go
                    Path(f"{plan.path(number - 1, shard)}.arrow").unlink(missing_ok=True)
    return counted


def _fresh(plan: Plan) -> None:
    """Empties the folder when it was left by another configuration or other files."""
    found = sha256(repr((plan.options, plan.shards)).encode("utf-8", "surrogateescape")).hexdigest()
    mark = plan.folder / "plan"
    if not mark.exists() or mark.read_text() != found:
        shutil.rmtree(plan.folder, ignore_errors=True)
        plan.folder.mkdir(parents=True)
        mark.write_text(found)


def publish(plan: Plan, out: Path) -> None:
    """Put the corpus into `out`: `train-`, `heldout-`, `removed-<shard>.parquet`, for shards that have any."""
    for shard in range(len(plan.shards)):
        for name in ("train", "heldout", "removed"):
            made = Path(f"{plan.path(len(plan.steps) - 1, shard)}.{name}.parquet")
            if made.exists():
                link(made, out / f"{name}-{shard:05d}.parquet")


def link(made: Path, path: Path) -> None:
    """A second name for a file, or a copy where the file system has none. The first stays for a run that goes on."""
    try:
        os.link(made, path)
    except OSError:
        shutil.copyfile(made, path)


def _task(plan: Plan, what: tuple[str, int, str], item: int) -> None:
    """What a worker does: a pass over a shard, or a part of bringing a block's keys in order."""
    kind, number, name = what
    if kind == "shard":
        run_shard(plan, number, item)
    else:
        join.task(plan.joined(number, name), kind, item)


def _join(plan: Plan, number: int, step: Step, each: Callable[..., Iterator[int]]) -> None:
    """Join the keys of a pass, block after block; what one removes, the next does not see."""
    paths, counts = plan.left(number)
    keys = Keys(paths, counts, [shard.split in STAYS for shard in plan.shards],
                each=lambda name, kind, count: deque(each((kind, number, name), list(range(count))), 0))
    for name in step.keys:
        state = State(plan.joined(number, name), paths, counts)
        if not state.done:
            block(name).join(keys.of(name), plan.options[name], state)
            state.commit()
        if (removed := state.get("removed")) is not None:
            keys.alive[removed & ~keys.protected] = False


def run_shard(plan: Plan, number: int, shard: int) -> None:
    """One pass over one shard, in batches; leaves its files whole or not at all."""
    step, path, source = plan.steps[number], plan.path(number, shard), plan.shards[shard]
    earlier = [plan.path(n, shard) for n in range(number)] if number == len(plan.steps) - 1 else None
    operations, kept = list(_operations(plan, number, shard)), 0
    with Writer(path, earlier) as writer:
        for batch, places in _batches(plan, number, shard):
            for operation in operations:
                batch, places = _through(batch, places, operation, writer, source.split, plan.share)
            for name in step.keys:
                writer.keys(name, block(name).keys(batch, plan.options[name]), kept)
            kept += len(batch)
            writer.keep(batch)
    rows = [row for one in operations for row in thresholds.look(one.name, one.options, one.judge, one.sample)]
    counts = {one.name: one.counts for one in operations}
    commit(path.with_suffix(".json"), {"documents": kept, "steps": counts, "thresholds": rows, **writer.counted()})


def _batches(plan: Plan, number: int, shard: int) -> Iterator[tuple[list[Document], np.ndarray]]:
    """Batches of a shard and where each document stands in it."""
    start = 0
    for batch in batched(plan.shards[shard].documents() if number == 0 else read(plan.path(number - 1, shard))):
        yield batch, np.arange(start, start + len(batch))
        start += len(batch)


def batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of about BATCH_BYTES of text."""
    batch, volume = [], 0
    for document in documents:
        batch.append(document)
        volume += len(document.text)
        if volume >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, volume = [], 0
    if batch:
        yield batch


def _operations(plan: Plan, number: int, shard: int) -> Iterator[Operation]:
    """What a pass does to a shard, in order."""
    step = plan.steps[number]
    if number == 0:
        yield Operation("read", lambda batch, *_: [document.fault for document in batch])
    for name in step.apply:
        yield Operation(name, _applied(plan, number - 1, shard, name), plan.options[name])
    # What an earlier curation kept is as it should be.
    for name in step.run if plan.shards[shard].split != "existing" else []:
        yield Operation(name, _alone(name), plan.options[name])


def _applied(plan: Plan, number: int, shard: int, name: str) -> thresholds.Judge:
    paths, counts = plan.left(number)
    state, offset = State(plan.joined(number, name), paths, counts), sum(counts[:shard])
    return lambda batch, places, options: block(name).apply(batch, places + offset, options, state)


def _alone(name: str) -> thresholds.Judge:
    module = block(name)
    if hasattr(module, "filter"):
        return lambda batch, _, options: module.filter(batch, options)
    return lambda batch, _, options: [module.clean(document, options) for document in batch]


def _through(batch, places, operation, writer, split, share) -> tuple[list[Document], np.ndarray]:
    """What is left of a batch after one block; protected documents always stay."""
    looked_at = split not in STAYS and thresholds.thresholds(operation.options)
    chosen = [i for i, document in enumerate(batch) if thresholds.drawn(document, share)] if looked_at else []
    texts, copies = [document.text for document in batch], [replace(batch[i]) for i in chosen]
    name, reasons = operation.name, operation.judge(batch, places, operation.options) if batch else []
    if name == "read" and split in STAYS and (broken := next((one for one in batch if one.fault), None)):
        field = "benchmarks" if split == "benchmark" else split
        raise CuveeError(f"data.{field}: {broken.id} cannot be compared with ({broken.fault}); give text in one of the fields "
                         f"{', '.join(TEXT_FIELDS)}, or leave it out")
    operation.sample += [thresholds.Seen(copy, places[i], reasons[i]) for i, copy in zip(chosen, copies, strict=True)]
    stays = [not reason or split in STAYS for reason in reasons]
    for document, text, reason, stay in zip(batch, texts, reasons, stays, strict=True):
        if not stay:
            writer.remove(document, name, reason)
        elif document.text != text and split not in STAYS:
            operation.counts[2] += 1
            writer.change(document, name, text)
    left = [document for document, stay in zip(batch, stays, strict=True) if stay]
    if split not in STAYS:
        operation.counts[0] += len(batch) - len(left)
        operation.counts[1] += len(left)
        operation.counts[3] += sum(size(document.text) for document in left)
    return left, places[np.array(stays, bool)]


def select(name: str, documents: list[Document], options: Any = None) -> list[str]:
    """One block alone on documents in memory: a reason to remove each, or ""."""
    import tempfile

    module = block(name)
    options = options if options is not None or not hasattr(module, "Config") else module.Config()
    if not joins(name):
        return _alone(name)(documents, None, options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "keys")
        with Writer(path) as writer:
            writer.keys(name, module.keys(documents, options), 0)
            writer.keep(documents)
        state = State(Path(folder, "join"), [path], [len(documents)])
        module.join(Keys([path], [len(documents)], [False]).of(name), options, state)
        state.commit()
        return module.apply(documents, np.arange(len(documents)), options, state)
