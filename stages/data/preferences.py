"""A user's own preferences: pairs or rated completions in JSONL or Parquet, each checked, as PAIRS; what is refused is told by
line. Reward models and offline preference training take them beside what the policy samples."""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from stages.chat.messages import Refused, preference
from stages.data.lines import SOURCES, Refusals, entries, records
from stages.stage import Artifact, ConfigError, Context, CuveeError, Input, Kind, option, placement

VERSION = "1"
INPUTS = {"tokenizer": Input(Kind.TOKENIZER)}
OUTPUT = Kind.PAIRS
STAGE = "data.preferences"


@dataclass
class Config:
    sources: list[str] = placement([], SOURCES)
    domain: str = option("own", "the domain that they count as, in accuracies by domain")
    max_rejected: float = option(0.5, "largest share of refused lines; with more, the files are taken for wrong ones")


def check(config: Config, inputs: dict[str, Any]) -> None:
    if not config.sources:
        raise ConfigError("sources: is empty; name a JSONL or Parquet file of preferences")
    if not 0 <= config.max_rejected <= 1:
        raise ConfigError(f"max_rejected: {config.max_rejected} is no share; give 0 to 1")


def external(config: Config) -> dict[str, Any]:
    """Name and digest of each file, in order. Raises CuveeError for a source without any."""
    return {"files": [[entry.name, entry.digest()] for entry in entries(config.sources, STAGE)]}


def run(config: Config, inputs: dict[str, Artifact], out: Path, ctx: Context) -> dict[str, float]:
    """Writes samples.jsonl (a row a prompt as rollout.sample writes them, without tokens and log-probabilities; id =
    file:line), rejected.jsonl and report.json. Raises CuveeError where too much is refused."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs["tokenizer"].path)
    refusals, seen, completions = Refusals(STAGE), set(), 0
    with (
        open(out / "samples.jsonl", "w", encoding="utf-8") as kept,
        open(out / "rejected.jsonl", "w", encoding="utf-8") as no,
    ):
        for entry in entries(config.sources, STAGE):
            for number, record in records(entry, STAGE):
                try:
                    row = _row(tokenizer, record, seen)
                except Refused as refused:
                    print(json.dumps(refusals.add(entry.name, number, refused), ensure_ascii=False), file=no)
                    continue
                completions += len(row["completions"])
                row = {"id": f"{entry.name}:{number}", "domain": config.domain, **row, "parts": {}}
                print(json.dumps(row, ensure_ascii=False), file=kept)
    told = {"prompts": len(seen), "completions": completions, "rejected": refusals.reasons.total(), "reasons": refusals.told()}
    (out / "report.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    refusals.judge(len(seen), config.max_rejected)
    ctx.log(f"{len(seen)} prompts with {completions} completions; {told['rejected']} lines refused")
    return {name: float(told[name]) for name in ("prompts", "completions", "rejected")}


def _row(tokenizer: Any, record: Any, seen: set[bytes]) -> dict[str, Any]:
    """The row of one record, which goes to `seen`. Raises Refused."""
    from stages.rollout._collect import answer_ids

    if isinstance(record, Refused):
        raise record
    row = preference(record)
    try:
        digest = sha256(json.dumps(row, ensure_ascii=False, sort_keys=True).encode()).digest()
    except UnicodeEncodeError as error:
        raise Refused("lone surrogate in the text", error.object) from None
    if digest in seen:
        raise Refused("the same preference stands on an earlier line")
    try:
        for text in row["completions"]:
            answer_ids(tokenizer, row, text)
    except CuveeError as error:
        raise Refused("the chat template refuses it", str(error)) from None
    seen.add(digest)
    return row
