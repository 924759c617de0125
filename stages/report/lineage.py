"""The lineage graph: which artifact was made from which, drawn in layers from the corpus down to the export."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from stages.report.facts import parents
from stages.report.svg import el, spread, svg, text

WIDTH, ROW, HEIGHT, WIDE, GAP, ASIDE = 1080.0, 56.0, 28.0, 118.0, 10.0, 170.0
HIDDEN = ("scores", "report")
MODELS = ("checkpoint", "export", "reward_model")


class Node:
    """One artifact, or several of one stage with the same parents (`records`), as a box."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records
        self.parents: dict[int, bool] = {}  # position of a parent node -> whether its weights flow here
        self.layer = 0
        self.x = 0.0

    @property
    def title(self) -> str:
        first = self.records[0]
        if len(self.records) == 1:
            return first["name"]
        return f"{first['stage'].split('.')[-1]} ×{len(self.records)}"

    @property
    def tooltip(self) -> str:
        lines = []
        for record in self.records:
            metrics = "  ".join(f"{k} {v:.4g}" for k, v in list(record.get("metrics", {}).items())[:4])
            lines.append(f"{record['name']}  {record['fingerprint'][:12]}  {record['stage']}  {metrics}")
        return "\n".join(lines)


def graph(records: dict[str, dict[str, Any]]) -> list[Node]:
    """Nodes in an order in which parents come first, with their layers: 1 + the deepest parent's."""
    shown = {fp: record for fp, record in records.items() if record["kind"] not in HIDDEN}
    order: list[str] = []

    def visit(fp: str) -> None:
        if fp in shown and fp not in order:
            for _, parent, _ in parents(shown[fp]):
                visit(parent)
            order.append(fp)

    for fp in sorted(shown, key=lambda fp: (shown[fp]["started"], shown[fp]["name"])):
        visit(fp)
    nodes: list[Node] = []
    where: dict[str, int] = {}
    for group in _groups([shown[fp] for fp in order]):
        node = Node(group)
        for record in group:
            where[record["fingerprint"]] = len(nodes)
        for arg, parent, kind in parents(group[0]):
            if parent in where:
                weights = kind == "checkpoint" and group[0]["kind"] in MODELS and arg != "base"
                node.parents[where[parent]] = node.parents.get(where[parent], False) or weights
        node.layer = 1 + max((nodes[i].layer for i in node.parents), default=-1)
        nodes.append(node)
    return nodes


def _groups(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Prompts of many domains stand as one box: they are made alike and used together. Every model stands alone."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for record in records:
        alike = (record["stage"], str(parents(record)))
        found.setdefault(alike if record["kind"] == "prompts" else record["fingerprint"], []).append(record)
    return list(found.values())


def place(nodes: list[Node]) -> None:
    """Set x, the centre of each box. Models stand below the mean of those whose weights they continue, side by side;
    data and samples left of them, reward models right, so that the weights' way down the middle is free."""
    for depth in range(max(node.layer for node in nodes) + 1):
        layer = [node for node in nodes if node.layer == depth]
        sides: dict[float, list[Node]] = {-1.0: [], 0.0: [], 1.0: []}
        for node in layer:
            kind = node.records[0]["kind"]
            sides[1.0 if kind == "reward_model" else 0.0 if kind in MODELS else -1.0].append(node)
        gap = min(WIDE + GAP, (WIDTH - WIDE) / max(len(layer) - 1, 1))
        above = [[nodes[i].x for i, weights in node.parents.items() if weights] for node in sides[0.0]]
        middle = spread([sum(xs) / len(xs) if xs else WIDTH / 2 for xs in above], gap)
        for node, x in zip(sides[0.0], middle, strict=True):
            node.x = x
        for side in (-1.0, 1.0):
            edge = max((side * (x - WIDTH / 2) for x in middle), default=-WIDTH)
            start = max(ASIDE, edge + gap)
            for i, node in enumerate(sides[side]):
                node.x = WIDTH / 2 + side * (start + i * gap)
        # Into the picture, over whose edge a full middle may push a side: moved, and narrowed where that is not enough.
        low, high = min(node.x for node in layer), max(node.x for node in layer)
        scale = min(1.0, (WIDTH - WIDE) / max(high - low, 1.0))
        start = min(max(low, WIDE / 2), WIDTH - WIDE / 2 - (high - low) * scale)
        for node in layer:
            node.x = start + (node.x - low) * scale


def draw(records: dict[str, dict[str, Any]]) -> Markup:
    """The graph as SVG: thick lines carry weights, thin ones data. The page's script lights a box's ancestors."""
    nodes = graph(records)
    place(nodes)
    depth = max(node.layer for node in nodes)
    edges, boxes = [], []
    for i, node in enumerate(nodes):
        y = node.layer * ROW
        count = sum(other.layer == node.layer for other in nodes)
        wide = min((WIDTH - WIDE) / max(count - 1, 1) - GAP, WIDE)
        for parent, weights in node.parents.items():
            start = nodes[parent].layer * ROW + HEIGHT
            bend = (y - start) * 0.5
            x0, x1 = nodes[parent].x, node.x
            d = f"M{x0:.1f} {start:.1f}C{x0:.1f} {start + bend:.1f} {x1:.1f} {y - bend:.1f} {x1:.1f} {y:.1f}"
            far = node.layer - nodes[parent].layer > 1
            tone = "edge weights" if weights else "edge far" if far else "edge"
            edges.append((weights, el("path", d=d, class_=tone, data_from=parent, data_to=i)))
        area = node.records[0]["stage"].split(".")[0]
        boxes.append(el(
            "g", el("title", node.tooltip),
            el("rect", x=node.x - wide / 2, y=y, width=wide, height=HEIGHT, rx=5, class_=f"box {area}"),
            text(node.x, y + HEIGHT / 2 + 4, node.title, "box-label", "middle"), data_node=i, class_="box-group",
        ))  # fmt: skip
    lines = [edge for weights, edge in sorted(edges, key=lambda pair: pair[0])]
    return svg(WIDTH, depth * ROW + HEIGHT + 4, "Lineage: which artifact was made from which", *lines, *boxes)
