"""Labels for the quality classifier: an LLM judges a sample of the corpus, as FineWeb-Edu did (arXiv 2406.17557, section 4).

The outcome is a corpus with a column `score`: input `labels` of data.curate, whose block `classifier` learns from it.
"""

import heapq
import json
from collections import Counter
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from stages.data import corpus
from stages.stage import Artifact, ConfigError, Context, CuveeError, Estimate, Input, Kind, identity, option, placement
from stages.teacher.client import Request, Teacher, client_of, teachers, totals
from stages.teacher.judge import FIXED, POINTS

VERSION = "1"
INPUTS = {"corpus": Input(Kind.CORPUS)}
OUTPUT = Kind.CORPUS
RUBRIC = """You grade a text from the web by what a reader learns from it. Give a point for each of these that holds: it tells something \
about a subject of study, among whatever else; it keeps to such a subject; it explains it coherently, without much advertising or \
navigation; it could stand in a textbook for school, with examples or steps; it is outstanding: thorough, clear, free of anything else."""
FORM = '\n\n[Text]\n{text}\n\nFirst write down your reasons in a sentence, then the points, as one JSON object: {{"reasons": "...", "points": 0 to 5}}'


@dataclass
class Config:
    teacher: dict[str, Any] = placement({}, "the judge: {model, url, key, prices, limits, ...}, see stages/teacher/client.py")
    documents: int = option(10_000, "training documents judged, drawn by a hash")
    characters: int = option(3000, "of each document that the judge reads, from its beginning")
    rubric: str = option(RUBRIC, "what the points, 0 to 5, are for")
    seed: int = option(0, "decides which documents are judged")
    cache: str = placement("", "folder that keeps the answers for other runs too; empty keeps them until this stage is done")
    budget: float = placement(0.0, "most to spend, in the currency of the prices; 0 = no limit")
    dry_run: bool = placement(False, "count requests, tokens and cost, send nothing and stop")


def check(config: Config, inputs: dict[str, Any]) -> None:
    """Raises ConfigError for no teacher, and for nothing to judge."""
    _teacher(config)
    if config.documents < 1 or config.characters < 1:
        raise ConfigError(f"documents is {config.documents}, characters {config.characters}; give at least 1 of each")


def external(config: Config) -> dict[str, Any]:
    """What of the teacher decides its answers: the model and how it is sampled."""
    return {"teacher": identity(_teacher(config)["judge"])}


def estimate(config: Config, inputs: dict[str, Any]) -> Estimate:
    return Estimate(requests=config.documents)


def run(config: Config, inputs: dict[str, Artifact], out: Path, ctx: Context) -> dict[str, float]:
    """Writes train-00000.parquet (the corpus' columns and `score`, 0 to 5) and usage.json.

    Raises CuveeError for a dry run, with its counts, and when no answer has the form asked for.
    """
    import pyarrow
    import pyarrow.parquet

    drawn = _drawn(inputs["corpus"].path, config)
    asked = [config.rubric + FORM.format(text=row["text"][: config.characters]) for row in drawn]
    requests = [Request("judge", [{"role": "user", "content": text}], options=FIXED) for text in asked]
    client = client_of(config, _teacher(config), requests, "data.judge", ctx)
    found = [POINTS.findall(answer.text) for answer in client.complete(requests)]
    rows = [row | {"score": float(points[-1])} for row, points in zip(drawn, found, strict=True) if points]
    if not rows:
        raise CuveeError(f"data.judge.teacher: none of {len(found)} answers names its points as the rubric asks; try another model")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out / "train-00000.parquet", compression="zstd")
    (out / "usage.json").write_text(json.dumps({name: asdict(used) for name, used in client.usage.items()}, indent=1) + "\n")
    spread = Counter(int(row["score"]) for row in rows)
    ctx.log(f"{len(rows)} of {len(found)} documents judged: " + ", ".join(f"{spread[i]} got {i}" for i in range(6)))
    return {"documents": len(rows), "unreadable": len(found) - len(rows), "score": sum(row["score"] for row in rows) / len(rows),
            **totals(client.usage)}  # fmt: skip


def _teacher(config: Config) -> dict[str, Teacher]:
    if not config.teacher:
        raise ConfigError("teacher: is empty; give one, e.g. {model: own, url: http://127.0.0.1:8000/v1}")
    return teachers({"judge": config.teacher}, "data.judge.teacher")


def _drawn(path: Path, config: Config) -> list[dict[str, Any]]:
    """The training documents with the smallest hashes, in that order; code and names are not judged."""
    rows = (row for row in corpus.documents(path, "train") if row["domain"] not in ("code", "names"))
    return heapq.nsmallest(config.documents, rows, key=lambda row: (sha256(f"{config.seed}:{row['id']}".encode()).digest(), row["id"]))
