"""Encoding repair: mojibake undone (ftfy; for Korean read as Thai, see _korean.py), control characters and odd line ends gone, composed characters (NFC)."""

import unicodedata
from dataclasses import dataclass

from stages.data.blocks import _korean
from stages.data.document import Document
from stages.data.thresholds import at_most

LIBRARIES = ("ftfy",)


@dataclass
class Config:
    max_broken: float = at_most(0.01, "largest share of replacement characters (U+FFFD) a document may keep")


def clean(document: Document, config: Config) -> str:
    """Repairs the text in place; a reason to remove it, or "". Code only loses its mojibake."""
    text = document.text.replace("\r\n", "\n").replace("\r", "\n")
    document.text = _mojibake(text)
    if document.domain != "code":
        document.text = _characters(document.text, markup=bool(document.markup))
    if not document.text.strip():
        return "empty"
    broken = document.text.count("\ufffd")
    return f"undecodable: {broken} of {len(document.text)} characters" if broken > config.max_broken * len(document.text) else ""


def _mojibake(text: str) -> str:
    if text.isascii():
        return text
    if (korean := _korean.repair(text)) is not None:
        return korean
    import ftfy
    from ftfy.badness import is_bad

    if not is_bad(text):  # one look at the document instead of one a line
        return text
    off = dict.fromkeys(("fix_latin_ligatures", "fix_character_width", "uncurl_quotes", "fix_line_breaks"), False)
    off |= dict.fromkeys(("remove_terminal_escapes", "remove_control_chars", "unescape_html", "normalization"), None)
    return ftfy.fix_text(text, ftfy.TextFixerConfig(**off))


def _characters(text: str, markup: bool) -> str:
    if text.isascii() and text.replace("\n", " ").isprintable() and "&" not in text:
        return text
    from ftfy import fixes

    if not markup and "&" in text and "<" not in text:  # entities without a tag in sight are damage, not markup
        text = fixes.unescape_html(text)
    return unicodedata.normalize("NFC", fixes.remove_control_chars(fixes.remove_terminal_escapes(text)))
