"""Whether a suite's prompts were kept out of the training text: by the records of both, without reading either."""

from __future__ import annotations

import json

from stages.stage import Artifact, resolve


def contamination(prompts: Artifact, corpus: Artifact) -> str:
    """Why the held-out prompts may occur in the corpus' training split; "" where curation kept them out.

    prompts: a PROMPTS artifact. corpus: the CORPUS artifact that was trained on, whose `decontaminated.json` says against
    which files (by SHA-256), and whether against its own held-out documents, which the prompts of some tasks quote.
    """
    path = corpus.path / "decontaminated.json"
    if not path.exists():
        return "the corpus does not say against what it was decontaminated"
    told, config = json.loads(path.read_text(encoding="utf-8")), prompts.record.get("config", {})
    against, digests = {suite["digest"] for suite in told["suites"]}, prompts.record.get("external", {})
    for file in config.get("heldout_files", []):
        if digests.get(file) not in against:
            return f"{file} is not among data.benchmarks"
    quotes = config.get("heldout") and getattr(resolve("tasks", config["domain"]), "DOCUMENTS", False)
    return (
        "its prompts quote held-out documents, which no block decontaminate kept out"
        if quotes and not told["heldout"]
        else ""
    )
