"""The report on the reward model: is it right, is it sure where it is right, and what comes of optimising against it."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from stages.report.charts import percent, share
from stages.report.svg import dot, el, line, path, svg, text

WIDE, HIGH, TOP, LEFT, GAP = 280.0, 190.0, 34.0, 34.0, 70.0  # of a panel


def figure(judged: dict[str, Any]) -> Markup:
    """Panels side by side: reliability, margins and, where the model was probed, best of n. judged: `judged.json`."""
    panels = [_reliability(judged["reliability"]), _margins(judged["margins"])]
    panels += [_optimised(judged["optimised"])] if judged.get("optimised") else []
    placed = [
        el("g", *content, transform=f"translate({LEFT + i * (WIDE + GAP):.1f} 0)") for i, content in enumerate(panels)
    ]
    width = LEFT + len(panels) * (WIDE + GAP)
    return svg(width, TOP + HIGH + 40, "The reward model on pairs it was not trained on", *placed)


def _frame(title: str, below: str) -> list[Markup]:
    return [text(0, 14, title, "panel-title"), line(0, TOP + HIGH, WIDE, TOP + HIGH, "grid"),
            text(WIDE / 2, TOP + HIGH + 34, below, "tick", "middle")]  # fmt: skip


def _reliability(bins: list[dict[str, float]]) -> list[Markup]:
    def at(confidence: float, accuracy: float) -> tuple[float, float]:
        return WIDE * (confidence - 0.5) / 0.5, TOP + HIGH * (1 - accuracy)

    content = _frame("how often right, by how sure", "confidence (%)")
    for tick in (0.5, 0.75, 1.0):
        content += [text(at(tick, 0)[0], TOP + HIGH + 16, percent(tick), "tick", "middle"),
                    line(0, at(0.5, tick)[1], WIDE, at(0.5, tick)[1], "grid"),
                    text(-6, at(0.5, tick)[1] + 3.5, percent(tick), "tick", "end")]  # fmt: skip
    content.append(line(*at(0.5, 0.5), *at(1.0, 1.0), "even"))
    points = [at(one["confidence"], one["accuracy"]) for one in bins]
    content.append(path(points, "chain"))
    most = max(one["n"] for one in bins)
    for (x, y), one in zip(points, bins, strict=True):
        title = f"{one['n']} pairs, {share(one['confidence'])} sure, {share(one['accuracy'])} right"
        content.append(dot(x, y, 2.5 + 4 * (one["n"] / most) ** 0.5, "node", title))
    return content


def _margins(margins: dict[str, list[float]]) -> list[Markup]:
    edges, counts = margins["edges"], margins["counts"]
    step, most = WIDE / len(counts), max(counts) or 1
    content = _frame("margins of the pairs", "score of the better − score of the worse (nats)")
    for i, count in enumerate(counts):
        tall = HIGH * count / most
        bar = {"x": i * step + 1, "y": TOP + HIGH - tall, "width": step - 2, "height": tall}
        tone = "merge" if edges[i] >= 0 else "rollout"
        content.append(
            el("rect", el("title", f"{edges[i]:g} to {edges[i + 1]:g}: {count} pairs"), **bar, class_=f"bar {tone}")
        )
    for edge in (edges[0], 0.0, edges[-1]):
        x = WIDE * (edge - edges[0]) / (edges[-1] - edges[0])
        content.append(text(x, TOP + HIGH + 16, f"{edge:+g}".replace("-", "−") if edge else "0", "tick", "middle"))
    return content


def _optimised(rows: list[dict[str, float]]) -> list[Markup]:
    """Gold and proxy reward over the KL of best of n, each on a scale of its own."""
    content, longest = _frame("best of n by the model, each on its own scale", "best of n, placed at its KL from the policy"), rows[-1]["kl"] or 1.0
    for name, curve, mark in (("gold", "chain", "node"), ("proxy", "series s1", "mark s1")):
        values = [one[name] for one in rows]
        low, extent = min(values), (max(values) - min(values)) or 1.0
        points = [
            (WIDE * one["kl"] / longest, TOP + 8 + (HIGH - 16) * (1 - (one[name] - low) / extent)) for one in rows
        ]
        content.append(path(points, curve))
        content += [
            dot(x, y, 3, mark, f"best of {one['n']}: {name} {one[name]:.3f}")
            for (x, y), one in zip(points, rows, strict=True)
        ]
        content.append(
            text(points[-1][0] + 6, points[-1][1] + (4 if name == "gold" else -8), f"{name} {values[-1]:.2f}", "tick")
        )
    for one in rows:
        content.append(text(WIDE * one["kl"] / longest, TOP + HIGH + 16, str(one["n"]), "tick", "middle"))
    return content


def say(judged: dict[str, Any]) -> str:
    found = (
        f"Of {judged['pairs']} pairs of held-out prompts it orders {share(judged['accuracy'])} rightly; its confidence is off by "
        f"{share(judged['ece'])} on average."
    )
    if rows := judged.get("optimised"):
        first, last, best = rows[0], rows[-1], max(rows, key=lambda one: one["gold"])
        found += (
            f" The best of {last['n']} by its score has a verified reward of {last['gold']:.2f}, a single completion "
            f"{first['gold']:.2f}"
        )
        if best is first and best is not last:
            found += ": to optimise against it makes answers worse."
        elif best is not last:
            found += f"; it is over-optimised beyond the best of {best['n']} ({best['gold']:.2f})."
        else:
            found += "."
    return found
