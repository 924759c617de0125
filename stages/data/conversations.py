"""A user's own conversations for SFT: JSONL or Parquet, each checked and rendered; what is refused is told by line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.chat.messages import Refused, conversation
from stages.chat.render import MaskError, preview, render_row
from stages.data.lines import LinesConfig, Refusals, entries, records
from stages.stage import Artifact, Context, CuveeError, Input, Kind

VERSION = "2"
INPUTS = {"tokenizer": Input(Kind.TOKENIZER)}
OUTPUT = Kind.CONVERSATIONS
STAGE = "data.conversations"


@dataclass
class Config(LinesConfig):
    pass


def check(config: Config, inputs: dict[str, Any]) -> None:
    config.check("conversations")


def external(config: Config) -> dict[str, Any]:
    return config.external(STAGE)


def run(config: Config, inputs: dict[str, Artifact], out: Path, ctx: Context) -> dict[str, float]:
    """Writes train.jsonl (id = file:line, messages and what the template takes beside them), rejected.jsonl (file, line,
    reason, found) and report.json. Raises CuveeError where too much is refused, and with file and line for a conversation
    of which every token, or none, would be trained on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs["tokenizer"].path)
    report = Report()
    with (
        open(out / "train.jsonl", "w", encoding="utf-8") as kept,
        open(out / "rejected.jsonl", "w", encoding="utf-8") as no,
    ):
        for entry in entries(config.sources, STAGE):
            for number, record in records(entry, STAGE):
                row = report.take(tokenizer, entry.name, number, record)
                print(json.dumps(row, ensure_ascii=False), file=kept if "messages" in row else no)
    found = report.summary()
    (out / "report.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    report.refusals.judge(found["conversations"], config.max_rejected)
    ctx.log(f"{found['conversations']} conversations, {found['tokens']:,} tokens, {found['trained_tokens']:,} of them trained; "
            f"{found['rejected']} lines refused")  # fmt: skip
    for reason, told in found["reasons"].items():
        ctx.log(f"  {told['count']} x {reason}, e.g. {told['first'][0]['file']}:{told['first'][0]['line']}")
    return {name: float(found[name]) for name in ("conversations", "rejected", "tokens", "trained_tokens", "longest")}


class Report:
    """Counts what is kept and what is refused, and why."""

    def __init__(self) -> None:
        self.refusals = Refusals(STAGE, "conversation")
        self.lengths: list[int] = []
        self.trained = 0

    def take(self, tokenizer: Any, name: str, number: int, record: Any) -> dict[str, Any]:
        """The row of train.jsonl, or that of rejected.jsonl, for one record."""
        try:
            if isinstance(record, Refused):
                raise record
            row = conversation(record)
            digest = self.refusals.new(row)
            try:
                rendered = render_row(tokenizer, row)
            except MaskError as error:
                raise CuveeError(f"{STAGE}: {name}:{number}: {error}") from None
            except CuveeError as error:
                raise Refused("the chat template refuses it", str(error)) from None
        except Refused as refused:
            return self.refusals.add(name, number, refused)
        self.refusals.seen.add(digest)
        self.lengths.append(len(rendered.ids))
        self.trained += sum(rendered.mask)
        return {"id": f"{name}:{number}", **row}

    def summary(self) -> dict[str, Any]:
        lengths = sorted(self.lengths)
        return {
            "conversations": len(lengths),
            "rejected": self.refusals.reasons.total(),
            "tokens": sum(lengths),
            "trained_tokens": self.trained,
            "longest": lengths[-1] if lengths else 0,
            "percentiles": {str(p): lengths[min(len(lengths) - 1, len(lengths) * p // 100)] for p in (50, 90, 99) if lengths},
            "advice": advice(len(lengths)),
            "reasons": self.refusals.told(),
        }  # fmt: skip


def previews(tokenizer: Any, sources: list[str], turns: str) -> Iterator[str]:
    """Line by line what would be trained on, its text in [[ ]], or why the line is refused."""
    report = Report()
    for entry in entries(sources, STAGE):
        for number, record in records(entry, STAGE):
            row = report.take(tokenizer, entry.name, number, record)
            if "messages" not in row:
                yield f"{entry.name}:{number} is refused: {row['reason']} ({row['found']})"
                continue
            rendered = render_row(tokenizer, row, turns=turns)
            yield f"{row['id']}: {len(rendered.ids)} tokens, {sum(rendered.mask)} of them trained\n{preview(tokenizer, rendered)}\n"


def advice(conversations: int) -> dict[str, Any]:
    """Batch and learning rate by the size of a data set of `conversations`, Amazon Bedrock's for fine-tuning Claude 3 Haiku:
    from 1000 rows on batches of 32 to 64, from 500 on 16 to 32, else 4 to 16; the middle of each. Its multiplier of the
    learning rate is 0.1 to 2, and matters the more the larger the set: 1 from 1000 rows on, the batch's share of 32 below
    (linear scaling, Goyal et al. 2017), never below 0.1."""
    batch = 48 if conversations >= 1000 else 24 if conversations >= 500 else 10
    return {"batch_groups": batch, "lr_multiplier": 1.0 if conversations >= 1000 else max(batch / 32, 0.1)}
