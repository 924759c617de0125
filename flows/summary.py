"""What a run ends with on the terminal: what each stage gained, and where everything is."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows import together
from flows.config import state_dir
from flows.services import address, experiment_page, mlflow_page


def closing(store: Any, graph: Any, nodes: list[Any], seconds: float) -> Iterator[str]:
    """Lines: the matrix of scores in short, then model, report, Prefect, MLflow and the command to talk to it."""
    yield from _scores(store, nodes)
    made = {node.name: node for node in nodes}
    yield ""
    if "export" in made:
        yield f"  model    {store.folder(made['export'].fingerprint)}"
        called = sys.argv[0] if Path(sys.argv[0]).name == "cuvee" and not shutil.which("cuvee") else "cuvee"
        yield f"  talk     {called} chat {made['export'].inputs['model'].name}"
    if "report" in made:
        yield f"  report   {store.folder(made['report'].fingerprint) / 'report.html'}"
    prefect, mlflow = address("prefect"), address("mlflow")
    hint = "" if prefect and mlflow else "   (start both with `cuvee up`)"
    yield f"  prefect  {prefect or 'http://127.0.0.1:4200'}/runs{hint}"
    yield f"  mlflow   {experiment_page(mlflow, graph.conf.recipe.name) if mlflow else mlflow_page('http://127.0.0.1:5000')}"
    yield f"  state    {state_dir()}   ({seconds:.0f} s)"


def scores(store: Any, nodes: list[Any]) -> dict[str, dict[str, float]]:
    """Model -> domain -> mean score in per cent."""
    def read(node: Any) -> tuple[str, dict[str, float]]:
        try:
            found = json.loads((store.fetch(node.fingerprint) / "scores.json").read_text())["domains"]
        finally:
            store.release(node.fingerprint)
        return node.name.removeprefix("scores-"), {domain: 100 * one["mean"] for domain, one in found.items()}

    return dict(together(read, [node for node in nodes if node.name.startswith("scores-")]))


def _scores(store: Any, nodes: list[Any]) -> Iterator[str]:
    rows = scores(store, nodes)
    if not rows:
        return
    domains = list(next(iter(rows.values())))
    short = {"long_context": "long", "multilingual": "multiling", "instruction_following": "instr"}
    yield ""
    yield f"  {'score (%)':<22}" + "".join(f"{short.get(d, d)[:10]:>11}" for d in domains) + f"{'mean':>9}"
    for name, row in rows.items():
        values = [row[d] for d in domains]
        yield f"  {name:<22}" + "".join(f"{v:>11.1f}" for v in values) + f"{sum(values) / len(values):>9.1f}"
