"""Parquet: a record a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from stages.data.document import Document
from stages.data.formats._record import OTHER_FIELDS, TEXT_FIELDS, document

SUFFIXES = {".parquet"}
SEEKS = True  # reads its end first


def read(entry, file: BinaryIO) -> Iterator[Document]:
    """Every row."""
    import pyarrow

    try:
        for number, record in enumerate(rows(file, (*TEXT_FIELDS, *OTHER_FIELDS)), 1):
            name = f"{entry.name}#{number}"
            yield Document(name, "", fault="record is not UTF-8") if record is None else document(name, record)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk, not the file
            raise
        yield Document(entry.name, "", fault=f"damaged Parquet file: {str(error).splitlines()[0][:80]}")


def rows(file: BinaryIO, wanted: Sequence[str] = ()) -> Iterator[dict[str, Any] | None]:
    """Every row, with the `wanted` columns that there are (all, if none is named); None for one with text that is not UTF-8.

    Raises pyarrow.ArrowException, or OSError without errno, for a damaged file.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    columns = [name for name in table.schema_arrow.names if name in wanted or not wanted]
    for batch in table.iter_batches(batch_size=256, columns=columns):
        yield from _records(batch)


def _records(batch) -> list[dict | None]:
    """The rows; None for one with text that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [None] if batch.num_rows == 1 else [_records(batch.slice(i, 1))[0] for i in range(batch.num_rows)]
