"""A user's own conversations for SFT: JSONL or Parquet, each checked and rendered; what is refused is told by line."""

import hashlib
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.chat.messages import Refused, conversation
from stages.chat.render import MaskError, preview, render_row
from stages.data.formats import parquet
from stages.data.source import writable
from stages.data.sources import _files, _s3
from stages.data.sources._files import COMPRESSED, unreadable
from stages.stage import Artifact, ConfigError, Context, CuveeError, Input, Kind, option, placement

VERSION = "2"
INPUTS = {"tokenizer": Input(Kind.TOKENIZER)}
OUTPUT = Kind.CONVERSATIONS
KINDS = (".jsonl", ".ndjson", ".parquet")
EXAMPLES = 3  # of each reason in report.json
EXCERPT = 200  # characters of what was found
LONGEST = 32 << 20  # bytes of a line


@dataclass
class Config:
    sources: list[str] = placement(
        [], "JSONL and Parquet files (also gz, bz2, xz, zst), folders of them, s3:// prefixes"
    )
    max_rejected: float = option(0.5, "largest share of refused lines; with more, the files are taken for wrong ones")


def check(config: Config, inputs: dict[str, Any]) -> None:
    if not config.sources:
        raise ConfigError("sources: is empty; name a JSONL or Parquet file of conversations")
    if not 0 <= config.max_rejected <= 1:
        raise ConfigError(f"max_rejected: {config.max_rejected} is no share; give 0 to 1")


def external(config: Config) -> dict[str, Any]:
    """Name and digest of each file, in order. Raises CuveeError for a source without any."""
    return {"files": [[entry.name, entry.digest()] for entry in _entries(config)]}


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
        for entry in _entries(config):
            for number, record in _records(entry):
                row = report.take(tokenizer, entry.name, number, record)
                print(json.dumps(row, ensure_ascii=False), file=kept if "messages" in row else no)
    found = report.summary()
    (out / "report.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    total = found["conversations"] + found["rejected"]
    if not found["conversations"] or found["rejected"] > config.max_rejected * total:
        reason, told = next(
            iter(found["reasons"].items()), ("the files are empty", {"first": [{"file": "", "line": 0}]})
        )
        first = told["first"][0]
        raise CuveeError(f"data.conversations: {found['rejected']} of {total} lines are refused, most often: {reason} (first "
                         f"{first['file']}:{first['line']}); mend the files or raise max_rejected {config.max_rejected}")  # fmt: skip
    ctx.log(f"{found['conversations']} conversations, {found['tokens']:,} tokens, {found['trained_tokens']:,} of them trained; "
            f"{found['rejected']} lines refused")  # fmt: skip
    for reason, told in found["reasons"].items():
        ctx.log(f"  {told['count']} x {reason}, e.g. {told['first'][0]['file']}:{told['first'][0]['line']}")
    return {name: float(found[name]) for name in ("conversations", "rejected", "tokens", "trained_tokens", "longest")}


class Report:
    """Counts what is kept and what is refused, and why."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, list[dict[str, Any]]] = {}
        self.lengths: list[int] = []
        self.trained = 0

    def take(self, tokenizer: Any, name: str, number: int, record: Any) -> dict[str, Any]:
        """The row of train.jsonl, or that of rejected.jsonl, for one record."""
        try:
            if isinstance(record, Refused):
                raise record
            row = conversation(record)
            try:
                digest = hashlib.sha256(json.dumps(row, ensure_ascii=False, sort_keys=True).encode()).digest()
            except UnicodeEncodeError as error:
                raise Refused("lone surrogate in the text", error.object[:EXCERPT]) from None
            if digest in self.seen:
                raise Refused("the same conversation stands on an earlier line")
            try:
                rendered = render_row(tokenizer, row)
            except MaskError as error:
                raise CuveeError(f"data.conversations: {name}:{number}: {error}") from None
            except CuveeError as error:
                raise Refused("the chat template refuses it", str(error)) from None
        except Refused as refused:
            told = {"file": name, "line": number, "reason": refused.reason, "found": writable(refused.found[:EXCERPT])}
            self.reasons[refused.reason] += 1
            examples = self.first.setdefault(refused.reason, [])
            if len(examples) < EXAMPLES:
                examples.append({key: told[key] for key in ("file", "line", "found")})
            return told
        self.seen.add(digest)
        self.lengths.append(len(rendered.ids))
        self.trained += sum(rendered.mask)
        return {"id": f"{name}:{number}", **row}

    def summary(self) -> dict[str, Any]:
        lengths = sorted(self.lengths)
        return {
            "conversations": len(lengths),
            "rejected": self.reasons.total(),
            "tokens": sum(lengths),
            "trained_tokens": self.trained,
            "longest": lengths[-1] if lengths else 0,
            "percentiles": {str(p): lengths[min(len(lengths) - 1, len(lengths) * p // 100)] for p in (50, 90, 99) if lengths},
            "advice": advice(len(lengths)),
            "reasons": {r: {"count": n, "first": self.first[r]} for r, n in self.reasons.most_common()},
        }  # fmt: skip


def previews(tokenizer: Any, sources: list[str], turns: str) -> Iterator[str]:
    """Line by line what would be trained on, its text in [[ ]], or why the line is refused."""
    report = Report()
    for entry in _entries(Config(sources=sources)):
        for number, record in _records(entry):
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


def _entries(config: Config) -> list[Any]:
    """Files of all sources in order, two of one name told apart by a number."""
    found: list[Any] = []
    for source in config.sources:
        far = source.startswith("s3://")
        if not far and not Path(source).expanduser().exists():
            raise CuveeError(
                f"data.conversations.sources: {source} does not exist; name a JSONL or Parquet file, or a folder"
            )
        entries = [entry for entry in (_s3 if far else _files).entries(source) if entry.kind in KINDS]
        if not entries:
            raise CuveeError(f"data.conversations.sources: {source} holds no file of {', '.join(KINDS)}")
        found += entries
    names: Counter[str] = Counter()
    for entry in found:
        names[entry.name] += 1
        if names[entry.name] > 1:
            entry.name = f"{entry.name}~{names[entry.name]}"
    return found


def _records(entry: Any) -> Iterator[tuple[int, Any]]:
    """(line or row from 1, record); a Refused in the place of what can't be read."""
    if entry.kind == ".parquet":
        yield from _rows(entry)
        return
    number = 0
    try:
        with entry.open() as raw:
            file = COMPRESSED[entry.ending](raw) if entry.compressed else raw
            while line := file.readline(LONGEST):
                number += 1
                if len(line) == LONGEST:
                    raise CuveeError(
                        f"data.conversations: {entry.name}:{number} is longer than {LONGEST} bytes; split it"
                    )
                if line.strip():
                    yield number, _parsed(line)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None):  # the disk, not the file
            raise unreadable(entry.path, error) from error
        yield number + 1, Refused("damaged compressed file", str(error))


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Refused("no JSON in UTF-8", f"{type(error).__name__}: {error}")


def _rows(entry: Any) -> Iterator[tuple[int, Any]]:
    import pyarrow

    number = 0
    try:
        with entry.seekable() as file:
            for number, record in enumerate(parquet.rows(file), 1):
                yield number, Refused("text that is not UTF-8") if record is None else record
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk, not the file
            raise unreadable(entry.path, error) from error
        yield number + 1, Refused("damaged Parquet file", str(error).splitlines()[0])
