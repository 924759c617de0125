"""Parquet: a record a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from stages.data.document import Document
from stages.data.formats._record import OTHER_FIELDS, TEXT_FIELDS, document

SUFFIXES = {".parquet"}
SEEKS = True  # reads its end first


def read(entry, file: BinaryIO) -> Iterator[Document]:
    """Every row."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        wanted = [name for name in table.schema_arrow.names if name in (*TEXT_FIELDS, *OTHER_FIELDS)]
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                yield document(f"{entry.name}#{number}", record)
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        yield Document(entry.name, "", fault=f"damaged Parquet file: {str(error).splitlines()[0][:80]}")
