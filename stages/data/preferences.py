"""A user's own preferences: pairs or rated completions in JSONL or Parquet, each checked, as PAIRS; what is refused is told by
line. Reward models and offline preference training take them beside what the policy samples."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.chat.messages import Refused, preference
from stages.data.lines import LinesConfig, Refusals, entries, records
from stages.stage import Artifact, Context, CuveeError, Input, Kind, option

VERSION = "1"
INPUTS = {"tokenizer": Input(Kind.TOKENIZER)}
OUTPUT = Kind.PAIRS
STAGE = "data.preferences"


@dataclass
class Config(LinesConfig):
    domain: str = option("own", "the domain that they count as, in accuracies by domain")


def check(config: Config, inputs: dict[str, Any]) -> None:
    config.check("preferences")


def external(config: Config) -> dict[str, Any]:
    return config.external(STAGE)


def run(config: Config, inputs: dict[str, Artifact], out: Path, ctx: Context) -> dict[str, float]:
    """Writes samples.jsonl (a row a prompt as rollout.sample writes them, without tokens and log-probabilities; id =
    file:line), rejected.jsonl and report.json. Raises CuveeError where too much is refused."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs["tokenizer"].path)
    refusals, completions = Refusals(STAGE, "preference"), 0
    with (
        open(out / "samples.jsonl", "w", encoding="utf-8") as kept,
        open(out / "rejected.jsonl", "w", encoding="utf-8") as no,
    ):
        for entry in entries(config.sources, STAGE):
            for number, record in records(entry, STAGE):
                try:
                    row = _row(tokenizer, record, refusals)
                except Refused as refused:
                    print(json.dumps(refusals.add(entry.name, number, refused), ensure_ascii=False), file=no)
                    continue
                completions += len(row["completions"])
                row = {"id": f"{entry.name}:{number}", "domain": config.domain, **row, "parts": {}}
                print(json.dumps(row, ensure_ascii=False), file=kept)
    prompts, rejected = len(refusals.seen), refusals.reasons.total()
    told = {"prompts": prompts, "completions": completions, "rejected": rejected, "reasons": refusals.told()}
    (out / "report.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    refusals.judge(prompts, config.max_rejected)
    ctx.log(f"{prompts} prompts with {completions} completions; {rejected} lines refused")
    return {name: float(told[name]) for name in ("prompts", "completions", "rejected")}


def _row(tokenizer: Any, record: Any, refusals: Refusals) -> dict[str, Any]:
    """The row of one record, noted as kept. Raises Refused."""
    from stages.rollout._collect import answer_ids

    if isinstance(record, Refused):
        raise record
    row = preference(record)
    digest = refusals.new(row)
    try:
        for text in row["completions"]:
            answer_ids(tokenizer, row, text)
    except CuveeError as error:
        raise Refused("the chat template refuses it", str(error)) from None
    refusals.seen.add(digest)
    return row
