"""Licence headers of code: the comment at the top that speaks of copyright goes; what forbids use removes the file."""

import re
from dataclasses import dataclass

from stages.data.document import Document
from stages.stage import option

LINE = r"[ \t]*(?://|#|--|;|%|\")[^\n]*(?:\n|\Z)"
COMMENT = re.compile(rf"\A(?P<first>#![^\n]*\n)?\s*(?P<header>/\*.*?\*/|<!--.*?-->|(?:{LINE})+)", re.DOTALL)
SPEAKS = re.compile(r"copyright|licen[sc]e|all rights reserved|SPDX-License-Identifier|permission is hereby granted", re.IGNORECASE)
KEPT = re.compile(r"^.*(SPDX-License-Identifier|-\*-.*coding).*$", re.MULTILINE)
REFUSED = re.compile(r"\b(proprietary and confidential|confidential and proprietary|unauthori[sz]ed copying"
                     r"|do not distribute)\b", re.IGNORECASE)  # fmt: skip


@dataclass
class Config:
    refuse: bool = option(True, "remove files whose header forbids copying")


def clean(document: Document, config: Config) -> str:
    """Drops the header in place, but for the SPDX line; a reason to remove the file, or ""."""
    if document.domain != "code" or not (found := COMMENT.match(document.text)) or not SPEAKS.search(found["header"]):
        return ""
    if config.refuse and (forbids := REFUSED.search(found["header"])):
        return f"licence: {forbids[0].lower()}"
    lines = [] if found["header"].startswith(("/*", "<!--")) else KEPT.finditer(found["header"])
    kept = "".join(line[0] + "\n" for line in lines)
    document.text = (found["first"] or "") + kept + document.text[found.end() :].lstrip("\n")
    return ""
