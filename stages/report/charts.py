"""The report's figures: each a function from facts to an SVG."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from stages.report.facts import Facts, Interval, Model, busy, span
from stages.report.svg import diamond, dot, el, line, path, spread, svg, text

WIDTH = 1080.0


def percent(value: float) -> str:
    return f"{100 * value:.0f}"


def share(value: float) -> str:
    return f"{percent(value)}\u202f%"


def label(name: str) -> str:
    """A domain or model name as a reader writes it."""
    return name.replace("_", " ")


def trajectories(facts: Facts) -> Markup:
    """Small multiples: along the spine, the mean score and each domain's, with 95 % bands; the experts as dots."""
    columns, gap, top, plot, bottom, margin = 4, 30.0, 30.0, 120.0, 66.0, 42.0
    wide, high = (WIDTH - margin - (columns - 1) * gap) / columns, top + plot + bottom
    panels: list[str | None] = [None, *facts.domains]
    content = []
    for i, domain in enumerate(panels):
        x, y = margin + (i % columns) * (wide + gap), (i // columns) * high
        content.append(el("g", *_trajectory(facts, domain, wide, top, plot), transform=f"translate({x:.1f} {y:.1f})"))
    return svg(WIDTH, high * math.ceil(len(panels) / columns), "Scores along the recipe, by domain", *content)


def _trajectory(facts: Facts, domain: str | None, wide: float, top: float, plot: float) -> list[Markup]:
    left, spine = 6.0, facts.spine
    step = (wide - left - 10) / max(len(spine) - 1, 1)

    def score(model: Model) -> Interval:
        return model.score(domain) if domain else model.mean(facts.domains)

    def at(i: float, value: float) -> tuple[float, float]:
        return left + i * step, top + plot * (1 - value)

    content = [text(0, 14, label(domain) if domain else "mean of all domains", "panel-title")]
    for tick in (0.0, 0.5, 1.0):
        content += [line(0, at(0, tick)[1], wide, at(0, tick)[1], "grid"),
                    text(-4, at(0, tick)[1] + 3.5, percent(tick), "tick", "end")]  # fmt: skip
    chain = [score(facts.models[name]) for name in spine]
    middle, below, above = ([at(i, one[part]) for i, one in enumerate(chain)] for part in range(3))
    content += [path(below + above[::-1], "band", close=True), path(middle, "chain")]
    for soup, experts in facts.soups():
        for key, expert in sorted(experts.items(), key=lambda item: item[0] == domain):  # the own expert on top
            value = score(expert)[0]
            x, y = at(spine.index(soup.name) - 0.5, value)
            own = key == domain
            content.append(dot(x, y, 4 if own else 2.5, "own" if own else "other", f"{expert.name}: {percent(value)}"))
    for i, (name, (value, low, high)) in enumerate(zip(spine, chain, strict=True)):
        x, y = at(i, value)
        slant = f"translate({x + 3:.1f} {top + plot + 13:.1f}) rotate(-40)"
        content += [dot(x, y, 3, "node", f"{name}: {percent(value)} ({percent(low)}–{percent(high)})"),
                    text(0, 0, name, "tick", "end", transform=slant)]  # fmt: skip
    x, y = at(len(spine) - 1, chain[-1][0])
    content.append(text(x, y - 9, percent(chain[-1][0]), "value", "end"))
    return content


def kept(rows: list[dict[str, Any]], soups: list[str]) -> Markup:
    """Dumbbells: where each domain stood before, what its expert reached alone, what the soup of all experts has."""
    gap, row, top, name, note = 40.0, 27.0, 42.0, 92.0, 108.0
    wide = (WIDTH - gap * (len(soups) - 1)) / len(soups) if len(soups) > 1 else WIDTH * 0.6
    plot, content, deepest = wide - name - note, [], 0
    for column, soup in enumerate(soups):
        mine = [one for one in rows if one["soup"] == soup]
        deepest, left = max(deepest, len(mine)), column * (wide + gap)
        content.append(text(left, 14, soup, "panel-title"))
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            x = left + name + plot * tick
            content += [
                line(x, top - 8, x, top + row * len(mine) - 8, "grid"),
                text(x, top - 13, percent(tick), "tick", "middle"),
            ]
        for i, one in enumerate(mine):
            y = top + row * i + 6
            before, alone, blended = (left + name + plot * one[key] for key in ("before", "alone", "blended"))
            left_over = "no sure gain" if one["share"] is None else f"keeps {share(one['share'])}"
            reached = {one["parent"]: one["before"], one["expert"]: one["alone"], soup: one["blended"]}
            values = ", ".join(f"{model} {percent(value)}" for model, value in reached.items())
            content += [
                text(left, y + 4, label(one["domain"]), "row-label"), line(before, y, alone, y, "reach"),
                dot(before, y, 3.5, "before", values), dot(alone, y, 4.5, "own", values),
                diamond(blended, y, 5.5, "soup", values),
                text(left + name + plot + 14, y + 4, left_over, "note" if one["share"] is None else "value"),
            ]  # fmt: skip
    return svg(
        WIDTH if len(soups) > 1 else wide,
        top + row * deepest,
        "Each expert's gain and what the soup keeps of it",
        *content,
    )


def win_rates(rows: list[dict[str, Any]], final: str) -> Markup:
    """Win rates with their intervals around the even line: the final model, and each next model, against each model."""
    row, top, name, gap = 26.0, 40.0, 210.0, 44.0
    wide = (WIDTH - gap) / 2
    plot = wide - name - 60
    content = []
    for column, (field, title) in enumerate(
        (("next", "each model against the one before"), ("final", f"{final} against each"))
    ):
        left = column * (wide + gap)
        x0 = left + name
        content.append(text(left, 14, title, "panel-title"))
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            x = x0 + plot * tick
            content += [line(x, top - 8, x, top + row * len(rows) - 8, "even" if tick == 0.5 else "grid"),
                        text(x, top - 13, percent(tick), "tick", "middle")]  # fmt: skip
        for i, one in enumerate(rows):
            value, low, high = one[field]
            y = top + row * i + 5
            tone = "up" if low > 0.5 else "down" if high < 0.5 else "even-handed"
            names = f"{one['successor']} : {one['model']}" if field == "next" else f"{final} : {one['model']}"
            content += [
                text(left, y + 4, names, "row-label"),
                line(x0 + plot * low, y, x0 + plot * high, y, f"interval {tone}"),
                dot(x0 + plot * value, y, 4.5, f"mark {tone}", f"{share(value)} ({percent(low)}–{percent(high)})"),
                text(x0 + plot + 14, y + 4, share(value), "value"),
            ]
    return svg(WIDTH, top + row * len(rows), "Win rates by the reward model", *content)


def lengths(facts: Facts, domain: str) -> Markup:
    """Accuracy against the length of the text (characters), for the models where it is decided."""
    chosen = _lines(facts, domain)
    found = {m.name: m.scores["lengths"][domain] for m in chosen}
    sizes = sorted({int(size) for one in found.values() for size in one})
    left, right, top, plot = 40.0, 190.0, 14.0, 220.0
    wide = 760.0
    step = (wide - left - right) / max(len(sizes) - 1, 1)

    def at(size: int, value: float) -> tuple[float, float]:
        return left + sizes.index(size) * step, top + plot * (1 - value)

    content = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = at(sizes[0], tick)[1]
        content += [line(left, y, wide - right, y, "grid"), text(left - 8, y + 3.5, percent(tick), "tick", "end")]
    content += [text(at(size, 0)[0], top + plot + 18, f"{size:,}", "tick", "middle") for size in sizes]
    content.append(
        text((left + wide - right) / 2, top + plot + 36, "characters of text around the question", "tick", "middle")
    )
    ends = [at(sizes[-1], found[m.name][str(sizes[-1])]["mean"])[1] for m in chosen]
    for i, (model, y) in enumerate(zip(chosen, spread(ends, 15), strict=True)):
        points = [(size, found[model.name].get(str(size))) for size in sizes]
        final = model is facts.final
        if final:
            low, high = ([at(size, one[key]) for size, one in points if one] for key in ("low", "high"))
            content.append(path(low + high[::-1], "band", close=True))
        line_class = "chain" if final else f"series s{i % 5}"
        content.append(path([at(size, one["mean"]) for size, one in points if one], line_class))
        for size, one in points:
            if one:
                title = f"{model.name}, {size:,} characters: {percent(one['mean'])} ({one['n']:.0f} prompts)"
                content.append(dot(*at(size, one["mean"]), 3, "node" if final else f"mark s{i % 5}", title))
        value = percent(found[model.name][str(sizes[-1])]["mean"])
        said = "value" if final else f"end s{i % 5}"
        content.append(text(wide - right + 12, y + 4, f"{model.name}  {value}", said))
    return svg(wide, top + plot + 44, f"{label(domain)}: score by length of the text", *content)


def _lines(facts: Facts, domain: str) -> list[Model]:
    """Models whose lines tell the story: before the experts, the domain's own experts, the soups, the final model."""
    names: list[str] = []
    for soup, experts in facts.soups():
        own = experts.get(domain)
        names += [own.parent] if own and own.parent and not names else []
        names += [own.name] if own and not any(facts.models[n].parent == own.parent for n in names) else []
        names.append(soup.name)
    names = names or facts.spine[:1]
    found = [facts.models[name] for name in dict.fromkeys([*names, facts.final.name])]
    return [model for model in found if model.scores["lengths"].get(domain)]


def curves(records: list[dict[str, Any]]) -> Markup:
    """A panel for each training stage: the loss by step; below, what a stage of preferences or rewards logs too."""
    columns, gap, high, plot = 5, 24.0, 112.0, 58.0
    wide = (WIDTH - gap * (columns - 1)) / columns
    panels: list[tuple[int, str, str, list]] = []  # place in the grid; what should rise begins a row of its own
    for keys in (("loss",), ("reward", "accuracy"), ("kl",), ("entropy",), ("kl_sampler",)):
        start = -(-(panels[-1][0] + 1) // columns) * columns if panels else 0
        found = [
            (r["name"], key, r["series"][key]) for r in records for key in keys if len(r["series"].get(key, [])) > 1
        ]
        panels += [(start + i, *one) for i, one in enumerate(found)]
    content = []
    for i, name, key, points in panels:
        steps, values = [p[0] for p in points], [p[1] for p in points]
        bottom, extent = min(values), max(values) - min(values)
        bottom, extent = (bottom, extent) if extent else (bottom - 0.5, 1.0)
        first, length = steps[0], (steps[-1] - steps[0]) or 1
        line_points = [(wide * (s - first) / length, 34 + plot * (1 - (v - bottom) / extent)) for s, v in points]
        tone = "rising" if key in ("reward", "accuracy") else "falling"
        content.append(el(
            "g", text(0, 12, name, "panel-title"), text(0, 27, key, f"tick {tone}"),
            text(wide, 27, f"{_number(values[0])} → {_number(values[-1])}", "tick", "end"),
            line(0, 34 + plot, wide, 34 + plot, "grid"), path(line_points, f"curve {tone}"),
            text(wide, 34 + plot + 11, f"{steps[-1]:,.0f} steps", "tick faint", "end"),
            transform=f"translate({(i % columns) * (wide + gap):.1f} {(i // columns) * high:.1f})",
        ))  # fmt: skip
    return svg(WIDTH, high * (panels[-1][0] // columns + 1), "Training curves", *content)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"


def timeline(records: list[dict[str, Any]]) -> Markup:
    """Every stage's start and end on one clock from which idle time is cut; many stages of one kind share a row."""
    spans, rows = busy(records), {}
    for record in sorted(records, key=lambda r: (span(r), r["name"])):
        shared = record["stage"] in ("evaluation.evaluate", "data.prompts")
        rows.setdefault(record["stage"] if shared else record["name"], []).append(record)
    total = sum(end - start for start, end in spans) or 1.0
    name, right, row, top = 130.0, 84.0, 15.0, 24.0
    scale = (WIDTH - name - right) / total

    def at(moment: float) -> float:
        return name + scale * sum(min(end, moment) - start for start, end in spans if start < moment)

    tick = next(
        size for size in (1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400, 10**9) if total / size <= 12
    )
    content = []
    for i in range(int(total // tick) + 1):
        x = name + scale * tick * i
        content += [line(x, top - 6, x, top + row * len(rows), "grid"), text(x, 12, clock(tick * i), "tick", "middle")]
    for i, (key, some) in enumerate(rows.items()):
        y = top + row * i
        title = f"{key.split('.')[-1]} ×{len(some)}" if len(some) > 1 else some[0]["name"]
        content.append(text(name - 10, y + 10, title, "row-label small", "end"))
        for record in some:
            start, end = span(record)
            area = record["stage"].split(".")[0]
            bar = {"x": at(start), "y": y + 2, "width": max(at(end) - at(start), 1.5), "height": row - 5, "rx": 2}
            content.append(
                el("rect", el("title", f"{record['name']}: {clock(end - start)}"), **bar, class_=f"bar {area}")
            )
        seconds = sum(record["seconds"] for record in some)
        content.append(text(at(span(some[-1])[1]) + 6, y + 10.5, clock(seconds), "tick"))
    return svg(WIDTH, top + row * len(rows) + 4, "Time of each stage", *content)


def clock(seconds: float) -> str:
    """A duration as a reader says it: 0.8 s, 42 s, 3 min 12 s, 2 h 05 min."""
    whole = round(seconds)
    if seconds < 10:
        text = f"{seconds:.1f}_s".replace(".0_", "_")
    elif whole < 60:
        text = f"{whole}_s"
    elif whole < 3600:
        text = f"{whole // 60}_min" + (f" {whole % 60}_s" if whole % 60 else "")
    else:
        text = f"{whole // 3600}_h {whole % 3600 // 60:02d}_min"
    return text.replace("_", "\u202f")  # a narrow space at which no line breaks
