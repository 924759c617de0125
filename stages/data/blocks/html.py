"""HTML text extraction: the main content of a page, without navigation, scripts and styles (resiliparse)."""

import re
from dataclasses import dataclass

from stages.data.document import Document
from stages.stage import option

LIBRARIES = ("resiliparse",)

# Tags whose nesting means depth: those that end by themselves are left out.
TAG = re.compile(r"<(/?)(?!(?:br|p|li|img|td|th|tr|dt|dd|option|meta|link|input|hr|source|wbr|area|col|embed|track)\b)"
                 r"([a-zA-Z][a-zA-Z0-9]*)(?:[^<>]*(/)>)?")  # fmt: skip
# HTML ignores the slash of <div/>, which stays open; in drawings and formulas, <path/> is whole.
OPEN = set("div span a b i em strong font center section article main nav aside header footer ul ol dl table tbody form pre".split())


@dataclass
class Config:
    min_share: float = option(0.2, "main content below this share of the page's text: the whole text is taken")
    max_characters: int = option(16_000_000, "longest page")
    max_depth: int = option(1000, "deepest nesting of tags: the time of the extraction grows with its square")


def clean(document: Document, config: Config) -> str:
    """Replaces a page by its text, in place; a reason to remove it, or ""."""
    if document.markup != "html":
        return ""
    if len(document.text) > config.max_characters:
        return f"page too long: {len(document.text)} characters"
    if (depth := _depth(document.text, config.max_depth)) > config.max_depth:
        return f"page nested too deep: {depth} tags"
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse(document.text)  # most of the time is here
    text = extract_plain_text(tree, preserve_formatting=True, main_content=True)
    # Short pages without <article> or <main> confuse the heuristics: never lose most of what is there.
    everything = extract_plain_text(tree, preserve_formatting=True)
    if len(text) < config.min_share * len(everything):
        text = everything
    document.text, document.markup = text.strip() + "\n", ""
    return "" if text.strip() else "page without text"


def _depth(page: str, limit: int) -> int:
    """How many tags are open at once; counting ends above the limit."""
    depth = deepest = 0
    if page.count("<") > limit:
        for tag in TAG.finditer(page):
            if tag[3] and tag[2].lower() not in OPEN:
                continue
            depth += -1 if tag[1] else 1
            if depth > deepest:
                deepest = depth
                if deepest > limit:
                    break
    return deepest
