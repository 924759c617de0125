"""Licence headers of code: the comment at the top that speaks of copyright goes; what forbids use removes the file."""

import os
import re
from dataclasses import dataclass
from functools import cache

from stages.data.document import Document
from stages.data.formats.text import CODE
from stages.stage import option

# Marks of a line's comment -> extensions of the languages that have it.
MARKS = {
    "#": ".py .pyi .sh .bash .zsh .rb .pl .pm .r .jl .ex .exs .yaml .yml .toml .ini .cmake .mk .tf .ps1 .php",
    "//": ".c .h .cc .cpp .cxx .hpp .hh .m .mm .cs .java .js .jsx .mjs .ts .tsx .vue .go .rs .swift .kt .kts .scala"
          " .dart .php .scss .less .groovy .v .sv .proto .zig",
    "--": ".sql .lua .hs .elm .adb .ads .vhd .vhdl", ";": ".lisp .el .clj .cljs .scm .rkt .asm .ini",
    "%": ".tex .sty .cls .erl",
}  # fmt: skip
# A record that names no file of code: what C's preprocessor reads is no comment.
UNKNOWN = ["//", "--", r"#(?!\s*(?:include|define|undef|if|ifdef|ifndef|pragma|import|error)\b)"]
SPEAKS = re.compile(r"copyright|licen[sc]e|all rights reserved|SPDX-License-Identifier|permission is hereby granted", re.IGNORECASE)
KEPT = re.compile(r"^.*(SPDX-License-Identifier|-\*-.*coding).*$", re.MULTILINE)
SPDX = re.compile(r"SPDX-License-Identifier:[^\n]*?(?=\s*(?:\*/|-->|$))", re.MULTILINE)
REFUSED = re.compile(r"\b(proprietary and confidential|confidential and proprietary|unauthori[sz]ed copying"
                     r"|do not distribute)\b", re.IGNORECASE)  # fmt: skip


@dataclass
class Config:
    refuse: bool = option(True, "remove files whose header forbids copying")


def clean(document: Document, config: Config) -> str:
    """Drops the header in place, but for the SPDX line; a reason to remove the file, or ""."""
    if document.domain != "code":
        return ""
    ending = os.path.splitext(document.id.partition("#")[0].lower())[1]
    found = _comment(ending).match(document.text)
    if not found or not SPEAKS.search(found["header"]):
        return ""
    if config.refuse and (forbids := REFUSED.search(found["header"])):
        return f"licence: {forbids[0].lower()}"
    header = found["header"]
    if header.startswith(("/*", "<!--")):
        begin, end = ("/*", "*/") if header.startswith("/*") else ("<!--", "-->")
        kept = "".join(f"{begin} {line[0]} {end}\n" for line in SPDX.finditer(header))
    else:
        kept = "".join(line[0] + "\n" for line in KEPT.finditer(header))
    document.text = (found["first"] or "") + kept + document.text[found.end() :].lstrip("\n")
    return ""


@cache
def _comment(ending: str) -> re.Pattern:
    """The comment at the top of a file with this extension."""
    known = any(ending in endings.split() for endings in MARKS.values()) or ending in CODE
    marks = [mark for mark, endings in MARKS.items() if ending in endings.split()] if known else UNKNOWN
    line = rf"(?:[ \t]*(?:{'|'.join(marks)})[^\n]*(?:\n|\Z))+" if marks else r"(?!)"
    return re.compile(rf"\A(?P<first>#![^\n]*\n)?\s*(?P<header>/\*.*?\*/|<!--.*?-->|{line})", re.DOTALL)
