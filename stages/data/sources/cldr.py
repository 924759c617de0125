"""Names of the world in Command A's 23 languages, from the Unicode CLDR through Babel: lists of `English: name`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stages.data.document import Document
from stages.data.sources._files import Entry, local

LANGUAGES = "en fr es it de pt ja ko ar zh ru pl tr vi nl cs id uk ro el hi he fa".split()
LINES_A_DOCUMENT = 25


def entries(source: str) -> list[Entry]:
    """Babel's file of each language; all are needed, a limit cuts their documents only."""
    import babel

    root = Path(babel.__file__).parent / "locale-data"
    found = [local(root / f"{language}.dat", f"{language}.dat") for language in LANGUAGES]
    for entry in found:
        entry.always = True
    return found


def _names(language: str) -> dict[str, dict[str, str]]:
    """Category -> key -> name, in one language."""
    from babel import Locale

    locale = Locale(language)
    cities = {key: zone["city"] for key, zone in locale.time_zones.items() if "city" in zone}
    long = {key: zone.get("long", {}) for key, zone in locale.meta_zones.items()}
    zones = {key: zone["standard"] for key, zone in long.items() if "standard" in zone}
    tables = {
        "territories": locale.territories, "languages": locale.languages, "currencies": locale.currencies,
        "months": locale.months["format"]["wide"], "days": locale.days["format"]["wide"],
        "quarters": locale.quarters["format"]["wide"], "scripts": locale.scripts, "cities": cities, "zones": zones,
    }
    return {category: {str(key): str(name) for key, name in table.items()} for category, table in tables.items()}


def _line(english: str, name: str) -> str:
    return name if name == english else f"{english}: {name}"


def documents(files: list[Entry]) -> Iterator[Document]:
    """A document for each language, category and 25 names. Languages take turns, so that a limit cuts them evenly."""
    names = {language: _names(language) for language in LANGUAGES}
    english = names["en"]
    for category in english:
        ordered = sorted(english[category])
        for part in range(0, len(ordered), LINES_A_DOCUMENT):
            keys = ordered[part : part + LINES_A_DOCUMENT]
            for language, tables in names.items():
                table = tables[category]
                lines = [_line(english[category][key], table[key]) for key in keys if key in table]
                if lines:
                    name = f"{language}/{category}#{part // LINES_A_DOCUMENT}"
                    yield Document(name, "\n".join([f"{category} ({language})", *lines, ""]), "names", language)
