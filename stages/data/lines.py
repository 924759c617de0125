"""A user's own records, a line or a row each: JSONL and Parquet files read one by one, and what is refused told by line."""

from __future__ import annotations

import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from stages.chat.messages import Refused
from stages.data.formats import parquet
from stages.data.source import writable
from stages.data.sources import _files, _s3
from stages.data.sources._files import COMPRESSED, unreadable
from stages.stage import ConfigError, CuveeError, option, placement

KINDS = (".jsonl", ".ndjson", ".parquet")
EXAMPLES = 3  # of each reason in report.json
EXCERPT = 200  # characters of what was found
LONGEST = 32 << 20  # bytes of a line


@dataclass
class LinesConfig:
    sources: list[str] = placement([], "JSONL and Parquet files (also gz, bz2, xz, zst), folders of them, s3:// prefixes")
    max_rejected: float = option(0.5, "largest share of refused lines; with more, the files are taken for wrong ones")

    def check(self, lines: str) -> None:
        """Raises ConfigError without sources, and for no share. lines: what the sources should hold."""
        if not self.sources:
            raise ConfigError(f"sources: is empty; name a JSONL or Parquet file of {lines}")
        if not 0 <= self.max_rejected <= 1:
            raise ConfigError(f"max_rejected: {self.max_rejected} is no share; give 0 to 1")

    def external(self, stage: str) -> dict[str, Any]:
        """Name and digest of each file, in order. Raises CuveeError for a source without any."""
        return {"files": [[entry.name, entry.digest()] for entry in entries(self.sources, stage)]}


class Refusals:
    """Counts what is refused, and why. `stage` and `what` a line holds are named in errors. seen: digests of what is kept."""

    def __init__(self, stage: str, what: str):
        self.stage, self.what = stage, what
        self.seen: set[bytes] = set()
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, list[dict[str, Any]]] = {}

    def add(self, name: str, number: int, refused: Refused) -> dict[str, Any]:
        """The line of rejected.jsonl for line `number` of the file `name`."""
        told = {"file": name, "line": number, "reason": refused.reason, "found": writable(refused.found[:EXCERPT])}
        self.reasons[refused.reason] += 1
        examples = self.first.setdefault(refused.reason, [])
        if len(examples) < EXAMPLES:
            examples.append({key: told[key] for key in ("file", "line", "found")})
        return told

    def new(self, row: dict[str, Any]) -> bytes:
        """The digest of a row, for `seen`. Raises Refused for a row that can't be written, or is kept already."""
        try:
            digest = sha256(json.dumps(row, ensure_ascii=False, sort_keys=True).encode()).digest()
        except UnicodeEncodeError as error:
            raise Refused("lone surrogate in the text", error.object) from None
        if digest in self.seen:
            raise Refused(f"the same {self.what} stands on an earlier line")
        return digest

    def told(self) -> dict[str, Any]:
        """Reason -> how often, and the first ones; the most frequent first."""
        return {r: {"count": n, "first": self.first[r]} for r, n in self.reasons.most_common()}

    def judge(self, kept: int, most: float) -> None:
        """Raises CuveeError where nothing was kept, or more than the share `most` was refused."""
        refused = self.reasons.total()
        if kept and refused <= most * (kept + refused):
            return
        empty = ("the files are empty", {"first": [{"file": "", "line": 0}]})
        reason, told = next(iter(self.told().items()), empty)
        first = told["first"][0]
        raise CuveeError(f"{self.stage}: {refused} of {kept + refused} lines are refused, most often: {reason} (first "
                         f"{first['file']}:{first['line']}); mend the files or raise max_rejected {most}")  # fmt: skip


def entries(sources: list[str], stage: str) -> list[Any]:
    """Files of all sources in order, two of one name told apart by a number. Raises CuveeError for a source without any."""
    found: list[Any] = []
    for source in sources:
        far = source.startswith("s3://")
        if not far and not Path(source).expanduser().exists():
            raise CuveeError(f"{stage}.sources: {source} does not exist; name a JSONL or Parquet file, or a folder")
        files = [entry for entry in (_s3 if far else _files).entries(source) if entry.kind in KINDS]
        if not files:
            raise CuveeError(f"{stage}.sources: {source} holds no file of {', '.join(KINDS)}")
        found += files
    names: Counter[str] = Counter()
    for entry in found:
        names[entry.name] += 1
        if names[entry.name] > 1:
            entry.name = f"{entry.name}~{names[entry.name]}"
    return found


def records(entry: Any, stage: str) -> Iterator[tuple[int, Any]]:
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
                    raise CuveeError(f"{stage}: {entry.name}:{number} is longer than {LONGEST} bytes; split it")
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
