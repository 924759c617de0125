"""The few SVG elements that the report's figures are drawn with. Colours come from the page's style sheet, by class."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup, escape


def el(tag: str, *content: Any, **attributes: Any) -> Markup:
    """An element; `class_` is class, an underscore inside a name is a dash, None leaves an attribute out."""
    pairs = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    head = tag + "".join(f' {name}="{escape(_short(value))}"' for name, value in pairs)
    body = "".join(escape(part) for part in content)
    return Markup(f"<{head}>{body}</{tag}>" if body else f"<{head}/>")


def _short(value: Any) -> Any:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def text(x: float, y: float, content: Any, class_: str = "", anchor: str = "start", **more: Any) -> Markup:
    return el("text", content, x=float(x), y=float(y), class_=class_ or None, text_anchor=anchor, **more)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return el("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str, close: bool = False) -> Markup:
    """Straight segments through the points."""
    d = "M" + "L".join(f"{_short(float(x))} {_short(float(y))}" for x, y in points) + ("Z" if close else "")
    return el("path", d=d, class_=class_)


def dot(x: float, y: float, r: float, class_: str, title: str = "") -> Markup:
    return el("circle", *([el("title", title)] if title else []), cx=float(x), cy=float(y), r=float(r), class_=class_)


def diamond(x: float, y: float, r: float, class_: str, title: str = "") -> Markup:
    d = f"M{x - r:.1f} {y:.1f}L{x:.1f} {y - r:.1f}L{x + r:.1f} {y:.1f}L{x:.1f} {y + r:.1f}Z"
    return el("path", *([el("title", title)] if title else []), d=d, class_=class_)


def svg(width: float, height: float, label: str, *content: Any) -> Markup:
    """The figure, `label` for readers who can't see it. It scales down to the page and scrolls on narrow screens."""
    inner = Markup("").join(content)
    drawing = el(
        "svg", inner, viewBox=f"0 0 {width:.0f} {height:.0f}", role="img", aria_label=label, width=f"{width:.0f}"
    )
    return el("div", drawing, class_="figure")


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions as near as possible to `wanted` (any order) that keep at least `gap` between neighbours."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    for _ in range(400):
        for low, high in pairwise(order):
            overlap = gap - (placed[high] - placed[low])
            if overlap > 0:
                placed[low] -= overlap / 2
                placed[high] += overlap / 2
    return placed
