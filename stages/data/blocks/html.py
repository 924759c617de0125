"""HTML text extraction: the main content of a page, without navigation, scripts and styles (resiliparse)."""

from dataclasses import dataclass

from stages.data.document import Document
from stages.stage import option


@dataclass
class Config:
    min_share: float = option(0.2, "main content below this share of the page's text: the whole text is taken")


def clean(document: Document, config: Config) -> str:
    """Replaces a page by its text, in place; a reason to remove it, or ""."""
    if document.markup != "html":
        return ""
    from resiliparse.extract.html2text import extract_plain_text

    text = extract_plain_text(document.text, preserve_formatting=True, main_content=True)
    # Short pages without <article> or <main> confuse the heuristics: never lose most of what is there.
    everything = extract_plain_text(document.text, preserve_formatting=True)
    if len(text) < config.min_share * len(everything):
        text = everything
    document.text, document.markup = text.strip() + "\n", ""
    return "" if text.strip() else "page without text"
