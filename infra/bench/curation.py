"""Curation beside its peers, on the same files, in one run: prints MB/s a core (CPU time), ratios and agreement.

    python -m venv /tmp/peers && /tmp/peers/bin/pip install "datatrove[processing]==0.10.1" orjson spacy
    python infra/bench/curation.py --peers /tmp/peers/bin/python [--megabytes 4] [--rounds 3] [filters ...]

The texts are paragraphs of prose from the documentation of the packages installed here. Without --peers, Cuvee alone.

filters   Gopher's, C4's and FineWeb's rules one after the other, and how often each rule's decision is datatrove's
minhash   near-duplicate removal from JSON lines to files, with planted duplicates of which 1, 3 and 6 % of the words
          were exchanged; both with 14 bands of 8 hashes
tokens    to indexed files, beside Megatron's preprocessing loop with the same tokenizer
memory    blocks from encoding to decontamination, substrings among them, on 20 MB and on ten times as many, with shards
          and parts of joins an eighth of their usual size: peak memory, CPU time a GB, and in how many parts the keys were
          joined (more than one a join have been spilled to disk). The smaller corpus is run before the larger one and after
          it, --rounds times each, and its median compared: other work on the machine slows both
"""

import argparse
import ast
import json
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

EDITS = (0.01, 0.03, 0.06)  # shares of words exchanged
PLANTED = 100  # duplicates a level
RULES = ("gopher", "repetition", "c4", "fineweb")


def prose(size: int) -> list[str]:
    """Documents of 0.6 to 6 kB, up to `size` characters: paragraphs that are sentences, each once."""
    rng, seen, found, part, want = random.Random(0), set(), [], [], 600
    for text in _documentation(Path(sysconfig.get_paths()["purelib"])):
        for paragraph in re.split(r"\n\s*\n", text):
            paragraph = " ".join(paragraph.split())
            words = paragraph.split()
            plain = sum(word.strip(".,;:()\"'").isalpha() for word in words)
            if len(words) < 12 or plain < 0.85 * len(words) or paragraph[-1] not in ".!?" or paragraph in seen:
                continue
            seen.add(paragraph)
            part.append(paragraph)
            if sum(map(len, part)) > want:
                found.append("\n".join(part))
                part, want, size = [], rng.randint(600, 6000), size - sum(map(len, part))
                if size < 0:
                    return found
    return found


def _documentation(root: Path):
    for path in sorted(root.glob("*/METADATA")):
        yield path.read_text("utf-8", "replace").partition("\n\n")[2]
    for path in sorted(root.rglob("*.py")):
        try:
            nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        except (SyntaxError, ValueError, RecursionError):
            continue
        yield "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def plant(texts: list[str]) -> list[dict]:
    """The texts as records, and copies of some with words exchanged; ids tell which ("17" and "17+0.03")."""
    rng = random.Random(1)
    words = sorted({word for text in texts[:200] for word in text.split()})
    records = [{"id": str(i), "url": f"bench://{i}", "text": text} for i, text in enumerate(texts)]
    chosen = rng.sample(range(len(texts)), min(PLANTED * len(EDITS), len(texts)))
    for level, share in enumerate(EDITS):
        for i in chosen[level :: len(EDITS)]:
            edited = [rng.choice(words) if rng.random() < share else word for word in texts[i].split(" ")]
            records.append({"id": f"{i}+{share}", "url": f"bench://{i}+{share}", "text": " ".join(edited)})
    rng.shuffle(records)
    return records


def ours_filters(file: Path) -> dict:
    from stages.data.document import Document
    from stages.data.engine import batched
    from stages.stage import resolve

    texts = [json.loads(line)["text"] for line in open(file)]
    modules = [resolve("data/blocks", name) for name in RULES]

    def through(module, batch):
        if hasattr(module, "filter"):
            return module.filter(batch, module.Config())
        return [module.clean(document, module.Config()) for document in batch]

    def documents():
        return [Document(str(i), text, language="en") for i, text in enumerate(texts)]

    for module in modules:
        through(module, documents()[:50])
    started, kept = time.process_time(), 0
    for batch in batched(documents()):
        for module in modules:
            batch = [document for document, reason in zip(batch, through(module, batch), strict=True) if not reason]
        kept += len(batch)
    seconds = time.process_time() - started
    alone = {name: [not reason for batch in batched(documents()) for reason in through(module, batch)]
             for name, module in zip(RULES, modules, strict=True)}
    return {"seconds": seconds, "kept": kept, "alone": alone}


def peer_filters(file: Path) -> dict:
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    texts = [json.loads(line)["text"] for line in open(file)]
    filters = [GopherQualityFilter(), GopherRepetitionFilter(), C4QualityFilter(), FineWebQualityFilter()]

    def passes(one, document):
        found = one.filter(document)
        return found is True or not isinstance(found, tuple) and bool(found)

    for one in filters:
        passes(one, Document(text=texts[0], id="warm"))
    started = time.process_time()
    kept = 0
    for i, text in enumerate(texts):
        document = Document(text=text, id=str(i))
        kept += all(passes(one, document) for one in filters)
    seconds = time.process_time() - started
    alone = {name: [passes(one, Document(text=text, id=str(i))) for i, text in enumerate(texts)]
             for name, one in zip(RULES, filters, strict=True)}
    return {"seconds": seconds, "kept": kept, "alone": alone}


def ours_minhash(file: Path) -> dict:
    from stages.data import corpus, curate
    from stages.stage import Context, parse

    warm = file.with_name("warm.jsonl")
    warm.write_text(next(open(file)))
    for source in (warm, file):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "out")
            out.mkdir()
            values = {"sources": [str(source)], "blocks": ["minhash", "split"], "workers": 1,
                      "options": {"minhash": {"characters": 20, "bands": 14, "rows": 8}, "split": {"heldout": 0}}}
            started = time.process_time()
            curate.run(parse(curate.Config, values, "data"), {}, out, Context(Path(folder)))
            seconds = time.process_time() - started
            removed = [row["url"].removeprefix("bench://") for row in corpus.documents(out, "removed") if row["block"] == "minhash"]
    return {"seconds": seconds, "removed": removed}


def peer_minhash(file: Path) -> dict:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.text import split_into_words

    split_into_words("Warm up.")
    with tempfile.TemporaryDirectory() as root:
        config, reader = MinhashConfig(), JsonlReader(str(file.parent), glob_pattern=file.name)
        removed = JsonlWriter(f"{root}/removed", compression=None)
        jobs = [
            ([reader, MinhashDedupSignature(f"{root}/sigs", config=config)], 1),
            ([MinhashDedupBuckets(f"{root}/sigs", f"{root}/buckets", config=config)], config.num_buckets),
            ([MinhashDedupCluster(f"{root}/buckets", f"{root}/ids", config=config)], 1),
            ([reader, MinhashDedupFilter(f"{root}/ids", exclusion_writer=removed), JsonlWriter(f"{root}/out")], 1),
        ]
        started = time.process_time()
        for i, (pipeline, tasks) in enumerate(jobs):
            LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=f"{root}/log{i}").run()
        seconds = time.process_time() - started
        lines = [line for path in Path(root, "removed").rglob("*.jsonl") for line in open(path)]
        return {"seconds": seconds, "removed": [json.loads(line)["id"] for line in lines]}


def _tokenizer(file: Path) -> Path:
    """A byte-level BPE tokenizer of 16,384 tokens, trained on the texts once."""
    from stages.data import tokenizer

    folder = file.with_name("tokenizer")
    if not folder.exists():
        texts = [json.loads(line)["text"] for line in open(file)]
        tokenizer.save(tokenizer.train(texts, 16_384, 2), "compact", folder)
    return folder


def ours_tokens(file: Path) -> dict:
    import pyarrow
    import pyarrow.parquet

    from stages.data import tokens

    folder = _tokenizer(file)
    rows = [{"id": str(i), "text": json.loads(line)["text"], "domain": "prose", "source": "x"} for i, line in enumerate(open(file))]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file.with_name("train-00000.parquet"))
    with tempfile.TemporaryDirectory() as out:
        for _ in range(2):  # the second round is warm
            started = time.process_time()
            tokens._encode_file([file.with_name("train-00000.parquet")], folder / "tokenizer.json", 16_384, Path(out), 0, 0)
        return {"seconds": time.process_time() - started, "bytes": Path(out, "train-00000-prose.bin").stat().st_size}


def peer_tokens(file: Path) -> dict:
    """The loop of tools/preprocess_data.py (Megatron-LM 0.16) with a Hugging Face tokenizer, on one worker."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_tokenizer(file))
    tokenizer("warm up")
    with tempfile.TemporaryDirectory() as out:
        started = time.process_time()
        builder = IndexedDatasetBuilder(f"{out}/x.bin", dtype=DType.optimal_dtype(16_384))
        for line in open(file, encoding="utf-8"):
            ids = tokenizer(json.loads(line)["text"]).input_ids
            builder.add_document(torch.IntTensor(ids), [len(ids)])
        builder.finalize(f"{out}/x.idx")
        return {"seconds": time.process_time() - started, "bytes": Path(out, "x.bin").stat().st_size}


def ours_memory(file: Path) -> dict:
    from stages.data import curate, join, source
    from stages.stage import Context, parse

    source.SHARD, join.ROWS = 8 << 20, 500_000  # an eighth of what they are, so that the smaller corpus is above them too
    parts, sort = [], join._sorted
    join._sorted = lambda rows: parts.append(len(rows)) or sort(rows)
    warm = file.with_name("warm.jsonl")
    with open(file) as lines:
        warm.write_text("".join(line for line, _ in zip(lines, range(50), strict=False)))
    blocks = ["encoding", "html", "language", *RULES, "exact", "minhash", "substring", "split", "decontaminate"]
    for text in (warm, file):
        parts.clear()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "out")
            out.mkdir()
            values = {"sources": [str(text)], "workers": 1, "blocks": blocks, "options": {"split": {"heldout": 0.001}}}
            started = time.process_time()
            curate.run(parse(curate.Config, values, "data"), {}, out, Context(Path(folder)))
            seconds = time.process_time() - started
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return {"seconds": seconds, "megabytes": int(peak.split()[1]) / 1024, "rows": sum(parts), "parts": len(parts)}


def run(python: str, what: str, file: Path) -> dict:
    """One measurement in a process of its own: its last line of output."""
    done = subprocess.run([python, __file__, "--inside", what, str(file)], capture_output=True, text=True, check=False,
                          env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1",
                               "HOME": tempfile.gettempdir()})  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def compare(what: str, file: Path, size: float, peers: str, rounds: int) -> None:
    """Ours and the peer's, in turn; medians of the rounds."""
    peer = "megatron" if what == "tokens" else "datatrove"
    peers = sys.executable if what == "tokens" else peers
    found: dict[str, list[dict]] = {"cuvee": [], peer: []}
    for _ in range(rounds):
        found["cuvee"].append(run(sys.executable, f"ours_{what}", file))
        if peers:
            found[peer].append(run(peers, f"peer_{what}", file))
    speed = {name: size / statistics.median(one["seconds"] for one in all_) for name, all_ in found.items() if all_}
    print(f"{what}: " + ", ".join(f"{name} {value:.2f} MB/s a core" for name, value in speed.items()))
    if peers:
        print(f"  ratio {speed['cuvee'] / speed[peer]:.1f}")
    if what == "filters" and peers:
        ours, theirs = found["cuvee"][0]["alone"], found["datatrove"][0]["alone"]
        for name in RULES:
            same = sum(a == b for a, b in zip(ours[name], theirs[name], strict=True)) / len(ours[name])
            print(f"  {name}: the same decision for {same:.1%}, kept {sum(ours[name])} and {sum(theirs[name])} of {len(ours[name])}")
    if what == "tokens":
        print(f"  the same number of bytes: {found['cuvee'][0]['bytes'] == found[peer][0]['bytes']}")
    if what == "minhash":
        for name, all_ in found.items():
            if all_:
                print(f"  {name}: " + _recall(all_[0]["removed"], [json.loads(line)["id"] for line in open(file)]))


def _recall(removed: list[str], ids: list[str]) -> str:
    gone = set(removed)
    planted = [one for one in ids if "+" in one]
    originals = {one.split("+")[0] for one in planted}
    right = sum("+" in one or one in originals for one in gone)
    levels = []
    for share in EDITS:
        pairs = [one for one in planted if one.endswith(f"+{share}")]
        levels.append(f"{share:.0%} {sum(one in gone or one.split('+')[0] in gone for one in pairs) / len(pairs):.0%}")
    return f"found of the planted, by words exchanged: {', '.join(levels)}; precision {right / max(len(gone), 1):.1%} of {len(gone)}"


def memory(records: list[str], folder: Path, megabytes: float, rounds: int) -> None:
    """The default blocks and `substring`, whose joins do not fit in memory, on so many megabytes and on ten times as many."""
    vocabulary, cost = sorted({word for text in records for word in text.split() if word.isalpha()}), {1: [], 10: []}
    for times in cost:
        rng, number = random.Random(2), 0
        with open(folder / f"memory{times}.jsonl", "w") as lines:
            while lines.tell() < times * megabytes * 1e6:  # every text with a third of its words exchanged is a new one
                words = records[number % len(records)].split(" ")
                lines.write(json.dumps({"text": " ".join(rng.choice(vocabulary) if rng.random() < 0.33 else word for word in words)}) + "\n")
                number += 1
    for times in (*[1] * rounds, 10, *[1] * rounds):
        file = folder / f"memory{times}.jsonl"
        one, size = run(sys.executable, "ours_memory", file), file.stat().st_size / 1e6
        cost[times].append(one["seconds"] / size)
        print(f"memory: {size:.0f} MB in, {one['megabytes']:.0f} MB of memory, {cost[times][-1] * 1000:.0f} CPU-seconds a GB; "
              f"{one['rows'] / 1e6:.1f} million rows of keys joined in {one['parts']} parts", flush=True)
    print(f"  cost a GB at ten times the data: {cost[10][0] / statistics.median(cost[1]):.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["filters", "minhash", "tokens", "memory"])
    parser.add_argument("--peers", default="", help="a Python with datatrove 0.10.1")
    parser.add_argument("--megabytes", type=float, default=4)
    parser.add_argument("--memory-megabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print("\n" + json.dumps(globals()[args.what[0]](Path(args.what[1]))))
        return
    texts = prose(int(args.megabytes * 1e6))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prose.jsonl")
        file.write_text("".join(json.dumps(record) + "\n" for record in plant(texts)))
        size = sum(len(json.loads(line)["text"].encode()) for line in open(file)) / 1e6
        print(f"{len(texts)} documents, {size:.1f} MB with the planted duplicates; medians of {args.rounds} rounds")
        for what in args.what:
            if what == "memory":
                memory(texts, Path(folder), args.memory_megabytes, args.rounds)
            else:
                compare(what, file, size, args.peers, args.rounds)


if __name__ == "__main__":
    main()
