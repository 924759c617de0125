"""Print the entries of requirements.lock for what a pip report wants to install: `python locked.py report.json`. So that an
image installs bytes that are known, and of all that are locked only what it needs."""

import json
import re
import sys
from pathlib import Path


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


lock = Path("requirements.lock").read_text()
text = {canonical(found[1]): found[0] for found in re.finditer(r"^([\w.-]+)==(?:.*\\\n)*.*", lock, re.M)}
wanted = [(one["metadata"]["name"], one["metadata"]["version"]) for one in json.loads(Path(sys.argv[1]).read_text())["install"]]
for name, version in wanted:
    if f"=={version} " not in text.get(canonical(name), "") + " ":
        sys.exit(f"{name}=={version} is not in requirements.lock: pin it in constraints.txt and make the lock again")
    print(text[canonical(name)])
