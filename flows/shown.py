"""What a flow run shows on its page in Prefect: the plan when it starts, scores and places when it ends.

A page that can't be written costs a warning, not a run.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from prefect.artifacts import create_markdown_artifact

from flows import services
from flows.summary import scores
from flows.tracking import redacted

logger = logging.getLogger("cuvee.shown")


def plan(lines: list[str]) -> None:
    """The plan's table, one line a row, as the artifact `plan`."""
    _show("plan", "```\n" + "\n".join(lines) + "\n```", "What was made already, what this run makes, and why")


def result(store: Any, nodes: list[Any]) -> None:
    """Where everything is and the scores of every model, as the artifact `result`. $CUVEE_MLFLOW_URL: where people open
    MLflow, if that is another address than the one of this process."""
    made = {node.name: store.record(node.fingerprint) for node in nodes}
    lines = [f"- {what}: `{store.folder(made[name]['fingerprint'])}{file}`"
             for name, what, file in (("report", "report", "/report.html"), ("export", "model", "")) if name in made]
    places = (os.environ.get("CUVEE_MLFLOW_URL"), services.address("mlflow"), redacted(os.environ.get("MLFLOW_TRACKING_URI", "")))
    tracking = next(filter(None, places), "")
    run = (made[nodes[-1].name].get("mlflow") or {}).get("run_id")
    if tracking.startswith("http") and run:
        lines.append(f"- MLflow: [the run that made {nodes[-1].name}]({services.mlflow_page(tracking, f'/runs/{run}')})")
    rows = scores(store, nodes)
    if rows:
        domains = list(next(iter(rows.values())))
        lines += ["", "| score (%) | " + " | ".join(domains) + " | mean |", "| --- |" + " ---: |" * (len(domains) + 1)]
        lines += [f"| {name} | " + " | ".join(f"{v:.1f}" for v in [*row.values(), sum(row.values()) / len(row)]) + " |"
                  for name, row in rows.items()]
    _show("result", "\n".join(lines), "Where everything is, and the scores")


def _show(key: str, text: str, about: str) -> None:
    try:
        create_markdown_artifact(text, key=key, description=about)
    except Exception as error:
        logger.warning("Prefect did not take the artifact %r: %s", key, error)
