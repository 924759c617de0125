"""Web pages by their address: domains that are blocked, with all below them, lists of domains and addresses, and words that no
address may hold."""

from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from stages.data.blocks.url import normal
from stages.data.document import Document
from stages.data.source import find
from stages.data.text import hash64
from stages.stage import ConfigError, option, placement

FIELD = "data.options.domains.lists"


@dataclass
class Config:
    blocked: list[str] = option([], "domains, e.g. example.com; what lies below them is blocked too")
    lists: list[str] = placement([], "files, folders, s3:// prefixes: a domain (also as in a hosts file) or an address a line, blocked")
    words: list[str] = option([], "words that no address may hold, between its marks")
    allowed: list[str] = option([], "if any: the only domains whose pages stay; documents without address stay")


def external(config: Config) -> list[dict[str, Any]]:
    """The identity of the lists. Raises ConfigError for one that is compressed: its lines would name nothing."""
    found = find(config.lists, field=FIELD)
    if packed := [entry.name for source in found for entry in source.entries if entry.compressed]:
        raise ConfigError(f"{FIELD}: {packed[0]} is compressed; unpack it")
    return [source.identity() for source in found]


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
    if config.lists and (found := _listed(sorted({*above, normal(document.url)}), tuple(config.lists))):
        return f"on a list: {found}"
    if config.allowed and not above & _set(tuple(config.allowed)):
        return f"domain not allowed: {host}"
    if config.words:
        parts = set("".join(one if one.isalnum() else " " for one in document.url.lower()).split())
        if found := parts & _set(tuple(config.words)):
            return f"blocked word in the address: {min(found)}"
    return ""


@cache
def _set(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(name.lower().removeprefix("www.") for name in names)


def _listed(names: list[str], lists: tuple[str, ...]) -> str:
    """The first of the names that stands on a list, or ""."""
    known = _hashes(lists)
    if not len(known):  # lists of nothing but comments
        return ""
    values = np.array([hash64(name) for name in names], np.uint64)
    hits = known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values
    return names[int(hits.argmax())] if hits.any() else ""


@cache
def _hashes(lists: tuple[str, ...]) -> np.ndarray:
    """uint64, in order: the lines of all lists at 8 bytes each, of which there may be millions."""
    found = []
    for source in find(list(lists), field=FIELD):
        for entry in source.entries:
            with entry.open() as file:
                lines = (line.decode("utf-8", "replace").partition("#")[0].split() for line in file)
                found += [hash64(normal(words[-1]) if "/" in words[-1] else words[-1].lower().removeprefix("www.")) for words in lines if words]
    return np.unique(np.array(found, np.uint64))
