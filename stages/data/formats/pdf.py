"""PDF: the text layer (pypdf)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from stages.data.document import Document

LIBRARIES = ("pypdf",)
SUFFIXES = {".pdf"}
SEEKS = True


def read(entry, file: BinaryIO) -> Iterator[Document]:
    """One document, its pages separated by empty lines; a fault for a damaged, locked or scanned file."""
    import logging

    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it would tell of every small defect of every file
    try:
        pages = [page.extract_text().strip() for page in PdfReader(file).pages]
    except Exception as error:  # whatever a hostile file makes of the parser
        yield Document(entry.name, "", fault=f"damaged PDF: {type(error).__name__}")
        return
    text = "\n\n".join(page for page in pages if page)
    yield Document(entry.name, text + "\n" if text else "", fault="" if text else "PDF without a text layer")
