"""Flows of stages that have almost nothing to do: each curates one small file of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from prefect import flow, runtime

from flows.config import compose
from flows.flow import run_graph
from flows.graph import Graph, Node
from stages import stage as stages


def node(folder: Path, at: int) -> Node:
    text = folder / "text" / f"{at}.py"
    text.parent.mkdir(exist_ok=True)
    text.write_text(f"# {at}\n" + Path(json.__file__).read_text())
    values = {"sources": [str(text)], "blocks": ["split"], "options": {"split": {"heldout": 0}}}
    config = stages.parse(stages.load("data.curate").Config, values, "data")
    return Node(f"corpus-{at}", "data.curate", config, {}, "data")


@flow(name="no-op", persist_result=False)
def _flow(folder: str, which: list[int]) -> None:
    graph = Graph.__new__(Graph)  # no recipe of its own
    graph.conf = compose(["scale=micro", "cluster.cores=1"])  # one stage at a time
    graph.nodes = {one.name: one for one in (node(Path(folder), at) for at in which)}
    run_graph(graph, list(graph.nodes.values()), str(runtime.flow_run.id), show=lambda line: None)


def flow_of(folder: Path, which: Iterable[int]) -> None:
    _flow(str(folder), list(which))
