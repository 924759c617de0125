"""A shard's files between two passes: its documents (Arrow), what was removed, keys, identifiers, and what was counted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from stages.data.document import FIELDS, Document, size

COLUMNS = ["id", "text", "domain", "language", "source", "url"]  # of the corpus
REMOVED = [*COLUMNS, "block", "reason"]
EXAMPLES = 3  # removed documents shown in the table, and changed ones, a block
Row = dict[str, Any]


def commit(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, ensure_ascii=False))
    part.replace(path)


def read(path: Path) -> Iterator[Document]:
    """What a pass left of a shard."""
    return (Document(**row) for row in _rows(Path(f"{path}.arrow")))


def _rows(path: Path) -> Iterator[Row]:
    import pyarrow

    with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        for batch in stream:
            yield from batch.to_pylist()


class Writer:
    """Writes a pass's outcome for a shard: between passes as Arrow streams and keys, at the end as the corpus.

    earlier: None before the last pass; then the shard's paths in earlier passes, whose removed documents come first.
    """

    def __init__(self, path: Path, earlier: list[Path] | None = None):
        self.path, self.last, self.earlier = path, earlier is not None, earlier or []
        self.tables: dict[tuple, list[int]] = {}
        self.examples: dict[str, list[Row]] = {}
        self.changed: dict[str, list[Row]] = {}
        self.removed: list[Row] = []
        self.files: dict[str, Any] = {}
        self.end = 0

    def __enter__(self) -> Writer:
        self.stack = ExitStack()
        for path in self.earlier:
            for row in _rows(Path(f"{path}.removed")):
                self.removed.append(row)
                if len(self.removed) >= 1024:
                    self._flush_removed()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._flush_removed()
            if not self.last:
                self._write("arrow", [], FIELDS)
        self.stack.close()

    def remove(self, document: Document, block: str, reason: str) -> None:
        self.removed.append({name: getattr(document, name) for name in COLUMNS} | {"block": block, "reason": reason})
        self._count(document, block, rule(reason))
        if len(found := self.examples.setdefault(block, [])) < EXAMPLES:
            found.append({"id": document.id, "reason": reason, "text": document.text[:200]})
        if len(self.removed) >= 1024:
            self._flush_removed()

    def change(self, document: Document, block: str, before: str) -> None:
        """A document that a block changed: one of the first is shown where it did."""
        if len(found := self.changed.setdefault(block, [])) < EXAMPLES:
            after, step = document.text, 4096
            at = next((i for i in range(0, len(before), step) if before[i : i + step] != after[i : i + step]), len(before))
            at = max(at + len(os.path.commonprefix([before[at : at + step], after[at : at + step]])) - 40, 0)
            found.append({"id": document.id, "before": before[at : at + 160], "after": after[at : at + 160]})

    def keep(self, documents: list[Document]) -> None:
        """What stays of a batch: for the next pass, or the corpus by split."""
        if not self.last:
            if documents:
                self._write("arrow", [{name: getattr(document, name) for name in FIELDS} for document in documents], FIELDS)
                self._identify(documents)
            return
        for split in ("train", "heldout"):
            written = [document for document in documents if document.split == split
                       for _ in range(document.repeat if split == "train" else 1)]
            for document in written:
                self._count(document, split, "")
            self._write(split, [{name: getattr(document, name) for name in COLUMNS} for document in written], COLUMNS)

    def keys(self, block: str, rows: np.ndarray, first: int) -> None:
        """Append a block's keys; `document` counts within the batch, whose first document is the shard's `first`."""
        name = f"{block}.keys"
        if name not in self.files:
            commit(Path(f"{self.path}.{block}.dtype"), rows.dtype.descr)
            self.files[name] = self.stack.enter_context(open(f"{self.path}.{name}", "wb"))
        rows["document"] += first
        self.files[name].write(rows.tobytes())

    def counted(self) -> dict[str, Any]:
        return {"rows": [[*key, *value] for key, value in self.tables.items()], "examples": self.examples, "changed": self.changed}

    def _identify(self, documents: list[Document]) -> None:
        """Identifiers one after the other, and where each ends: a document's is found without reading the others."""
        for name in ("ids", "ends"):
            if name not in self.files:
                self.files[name] = self.stack.enter_context(open(f"{self.path}.{name}", "wb"))
        ids = [document.id.encode() for document in documents]
        ends = self.end + np.cumsum([len(one) for one in ids], dtype=np.int64)
        self.end = int(ends[-1])
        self.files["ids"].write(b"".join(ids))
        self.files["ends"].write(ends.tobytes())

    def _flush_removed(self) -> None:
        self._write("removed", self.removed, REMOVED)
        self.removed.clear()

    def _write(self, name: str, rows: list[Row], columns: list[str]) -> None:
        """Append to a stream of the pass (also without rows: a reader finds it), or to a Parquet file of the corpus."""
        import pyarrow
        import pyarrow.parquet

        types = {"repeat": pyarrow.int64()}
        schema = pyarrow.schema([(column, types.get(column, pyarrow.string())) for column in columns])
        if name not in self.files:
            if self.last and rows:
                file = pyarrow.parquet.ParquetWriter(f"{self.path}.{name}.parquet", schema, compression="zstd")
                self.files[name] = self.stack.enter_context(file)
            elif not self.last:
                options = pyarrow.ipc.IpcWriteOptions(compression="lz4")
                sink = self.stack.enter_context(pyarrow.OSFile(f"{self.path}.{name}", "wb"))
                self.files[name] = self.stack.enter_context(pyarrow.ipc.new_stream(sink, schema, options=options))
        if rows:
            table = pyarrow.Table.from_pylist(rows, schema)
            self.files[name].write_table(table)

    def _count(self, document: Document, outcome: str, why: str) -> None:
        key = (document.source, document.domain, document.language, outcome, why)
        total = self.tables.setdefault(key, [0, 0])
        total[0] += 1
        total[1] += size(document.text)


def rule(reason: str) -> str:
    """The part of a reason that many documents share."""
    return reason.partition(":")[0]
