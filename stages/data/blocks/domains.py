"""Web pages by their address: domains that are blocked, with all below them, and words that no address may hold."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from stages.data.document import Document
from stages.stage import option


@dataclass
class Config:
    blocked: list[str] = option([], "domains, e.g. example.com; what lies below them is blocked too")
    words: list[str] = option([], "words that no address may hold, between its marks")
    allowed: list[str] = option([], "if any: the only domains whose pages stay; documents without address stay")


def clean(document: Document, config: Config) -> str:
    """A reason to remove the document, or ""."""
    if "://" not in document.url:
        return ""
    try:
        host = (urlsplit(document.url).hostname or "").removeprefix("www.")
    except ValueError:  # brackets that hold no address of version 6
        return "malformed address"
    above = {host[i:] for i in range(len(host)) if i == 0 or host[i - 1] == "."}
    if found := above & _set(tuple(config.blocked)):
        return f"blocked domain: {min(found)}"
    if config.allowed and not above & _set(tuple(config.allowed)):
        return f"domain not allowed: {host}"
    if config.words:
        parts = set("".join(one if one.isalnum() else " " for one in document.url.lower()).split())
        if found := parts & _set(tuple(config.words)):
            return f"blocked word in the address: {min(found)}"
    return ""


_sets: dict[tuple[str, ...], frozenset[str]] = {}


def _set(names: tuple[str, ...]) -> frozenset[str]:
    if names not in _sets:
        _sets[names] = frozenset(name.lower().removeprefix("www.") for name in names)
    return _sets[names]
