"""The report's tables as plain values: cells with a figure, a note, a weight of colour in percent, and classes."""

from __future__ import annotations

from typing import Any

from stages.report.charts import clock, label, percent
from stages.report.facts import Facts, Interval, Model, parameter_count, span, work
from stages.report.lineage import HIDDEN

AREAS = ("data", "train", "rollout", "merge", "evaluation", "export")
STRONG = 67  # percent of colour from which the page's own text colour is the harder one to read


def ordered(facts: Facts) -> list[dict[str, Any]]:
    """All records in the order in which they were made."""
    return sorted(facts.records.values(), key=lambda record: (span(record), record["name"]))


def _kind(facts: Facts, model: Model) -> str:
    return "main" if model.name in facts.spine else "side"


def _rows(facts: Facts) -> list[tuple[Model, dict[str, Any]]]:
    """Each model with its row's name and kind; a break where the kind of row changes."""
    found: list[tuple[Model, dict[str, Any]]] = []
    for model in facts.models.values():
        kind = _kind(facts, model)
        breaks = bool(found) and found[-1][1]["kind"] != kind
        found.append((model, {"name": model.name, "kind": kind, "breaks": breaks}))
    return found


def _cell(interval: Interval, title: str, classes: list[str]) -> dict[str, Any]:
    value, low, high = interval
    weight = round(100 * max(value, 0.0))
    return {
        "value": percent(value), "note": f"{percent(low)}–{percent(high)}", "weight": weight, "title": title,
        "classes": " ".join([*classes, *(["strong"] if weight >= STRONG else [])]),
    }  # fmt: skip


def matrix(facts: Facts) -> list[dict[str, Any]]:
    """Models x domains, and the mean."""
    own = {(expert.name, domain) for _, experts in facts.soups() for domain, expert in experts.items()}
    best = {d: max(model.score(d)[0] for model in facts.models.values()) for d in facts.domains}
    top = max(model.mean(facts.domains)[0] for model in facts.models.values())
    rows = []
    for model, row in _rows(facts):
        cells = []
        for domain in facts.domains:
            one = model.scores["domains"][domain]
            title = (
                f"{model.name} on {label(domain)}: fully right {percent(one['solved'])} %, mean reward "
                f"{one['reward']:+.2f}, {one['n']} prompts, {one['tokens']:.0f} tokens a completion, "
                f"{percent(one['ended'])} % ended"
            )
            marks = ["own"] * ((model.name, domain) in own) + ["best"] * (0 < model.score(domain)[0] == best[domain])
            cells.append(_cell(model.score(domain), title, marks))
        mean = model.mean(facts.domains)
        cells.append(_cell(mean, f"{model.name}: mean of the domains", ["mean"] + ["best"] * (0 < mean[0] == top)))
        rows.append(row | {"cells": cells})
    return rows


def gain_rows(facts: Facts, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps of the spine x domains: change in points, coloured by sign and size."""
    extreme = max((abs(i[0]) for row in rows for i in [*row["domains"].values(), row["mean"]]), default=0.0) or 1.0

    def cell(interval: Interval, extra: list[str]) -> dict[str, Any]:
        value, low, high = interval
        sure = low > 0 or high < 0
        return {
            "value": signed(value), "note": f"{signed(low)} … {signed(high)}", "tone": "up" if value > 0 else "down",
            "weight": round(40 * abs(value) / extreme) if sure else 0, "title": "",
            "classes": " ".join([*extra, *([] if sure else ["unsure"])]),
        }  # fmt: skip

    return [
        {
            "name": row["model"],
            "cells": [*(cell(row["domains"][d], []) for d in facts.domains), cell(row["mean"], ["mean"])],
        }
        for row in rows
    ]


def claim_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claims with their figures as text: win rates in percent, gains of a score in points, of a reward as it is."""

    def written(row: dict[str, Any], value: float) -> str:
        if row["measure"].startswith("reward"):
            return f"{value:+.3f}".replace("-", "−")
        return f"{100 * value:.1f} %" if row["measure"] == "win rate" else f"{100 * value:+.1f}".replace("-", "−")

    return [
        row | {"on": label(row["on"]), "value": written(row, row["value"]),
               "interval": f"{written(row, row['low'])} … {written(row, row['high'])}"}
        for row in rows
    ]  # fmt: skip


def signed(value: float) -> str:
    """A change in points: +12, −3, 0."""
    points = round(100 * value)
    return f"{points:+d}".replace("-", "−") if points else "0"


def perplexity(facts: Facts) -> list[dict[str, Any]]:
    """Models x text domains: bits a byte and nats a token, deep where low. Empty where no text was scored."""
    models = list(facts.models.values())
    if not all(model.scores["perplexity"] for model in models):
        return []
    domains = sorted(models[0].scores["perplexity"])
    rows = []
    for model, row in _rows(facts):
        cells = []
        for domain in domains:
            column = [m.scores["perplexity"][domain]["bits_per_byte"] for m in models]
            one = model.scores["perplexity"][domain]
            weight = round(60 * (max(column) - one["bits_per_byte"]) / ((max(column) - min(column)) or 1.0))
            title = (f"{one['nats_per_token']:.3f} nats a token, perplexity {one['perplexity']:.1f}; "
                     f"{one['tokens']:,} tokens, {one['bytes']:,} bytes")  # fmt: skip
            cells.append({
                "value": f"{one['bits_per_byte']:.3f}", "note": f"{one['nats_per_token']:.2f}", "weight": weight,
                "title": title, "classes": "best" if one["bits_per_byte"] == min(column) else "",
            })  # fmt: skip
        rows.append(row | {"cells": cells})
    return rows


def angles(facts: Facts) -> list[dict[str, Any]]:
    """For each soup, the cosines of its experts' task vectors (lower triangle), as the merge recorded them."""
    found = []
    for soup, _ in facts.soups():
        pairs = {tuple(k.split("/")[1:]): v for k, v in soup.record["metrics"].items() if k.startswith("cosine/")}
        names = sorted({name for pair in pairs for name in pair})
        rows = []
        for i, a in enumerate(names[1:], 1):
            values = [pairs.get((b, a), pairs.get((a, b))) for b in names[:i]]
            cells = [None if v is None else {"value": f"{v:.2f}", "weight": round(45 * max(v, 0.0))} for v in values]
            rows.append({"name": label(a), "cells": [*cells, *[None] * (len(names) - 1 - i)]})
        if rows:
            found.append({"name": soup.name, "names": [label(name) for name in names], "rows": rows})
    return found


def samples(facts: Facts) -> list[dict[str, Any]]:
    """A prompt a domain on which the models of the spine differ, with what they answered."""
    soups = [soup.name for soup, _ in facts.soups()]
    before = [facts.models[s].parent for s in soups[:1]]
    shown = list(dict.fromkeys([*filter(None, before), *soups, facts.final.name])) if soups else facts.spine[-4:]
    found = []
    for domain in facts.domains:
        ids = [i for i, row in facts.final.samples.items() if row["domain"] == domain]
        ids = [i for i in ids if all(i in facts.models[name].samples for name in shown)]
        differing = [i for i in ids if len({facts.models[name].samples[i]["score"] for name in shown}) > 1]
        if not ids:
            continue
        chosen = (differing or ids)[0]
        row = facts.final.samples[chosen]
        answers = [{"model": name, **_answer(facts.models[name].samples[chosen])} for name in shown]
        found.append({"domain": label(domain), "id": chosen, "prompt": row["prompt"], "answer": row.get("answer", ""),
                      "completions": answers})  # fmt: skip
    return found


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    reward = f"{row['reward']:+.2f}".replace("-", "−") if row["reward"] else "0"
    return {"score": row["score"], "reward": reward, "text": row["completion"]}


def corpus(table: dict[str, Any] | None) -> dict[str, Any] | None:
    """What curation wrote in table.json: blocks, sources, reasons, thresholds, and examples of removed and changed documents."""
    if not table:
        return None
    most = max((one["removed"] for one in table["blocks"]), default=0) or 1
    blocks = [
        {"block": one["block"], "removed": f"{one['removed']:,}", "kept": f"{one['kept']:,}",
         "changed": f"{one['changed']:,}", "width": round(120 * one["removed"] / most), "megabytes": f"{one['bytes'] / 1e6:.2f}"}
        for one in table["blocks"]
    ]  # fmt: skip
    sources: dict[tuple[str, str], dict[str, int]] = {}
    reasons: dict[tuple[str, str], list[int]] = {}
    for row in table["rows"]:
        one = sources.setdefault((row["source"], row["domain"]), {"train": 0, "heldout": 0, "removed": 0, "bytes": 0})
        kept = row["outcome"] in ("train", "heldout")
        one[row["outcome"] if kept else "removed"] += row["documents"]
        one["bytes"] += row["bytes"] if kept else 0
        if not kept:
            found = reasons.setdefault((row["outcome"], row["rule"]), [0, 0])
            found[0], found[1] = found[0] + row["documents"], found[1] + row["bytes"]
    order = {one["block"]: i for i, one in enumerate(table["blocks"])}
    by_block = sorted(reasons.items(), key=lambda item: (order.get(item[0][0], 99), -item[1][0]))
    return {
        "blocks": blocks,
        "sources": [{"source": source, "domain": domain, "train": f"{one['train']:,}", "heldout": f"{one['heldout']:,}",
                     "removed": f"{one['removed']:,}", "megabytes": f"{one['bytes'] / 1e6:.2f}"}
                    for (source, domain), one in sorted(sources.items())],
        "reasons": [{"block": block, "rule": rule, "documents": f"{n:,}", "kilobytes": f"{size / 1e3:,.0f}"}
                    for (block, rule), (n, size) in by_block],
        "examples": [*({"block": block, **one} for block in order for one in table["removed_examples"].get(block, [])),
                     *({"block": block, "id": one["id"], "reason": "changed", "text": f"{one['before']}\n→\n{one['after']}"}
                       for block in order for one in table["changed_examples"].get(block, []))],
        "thresholds": [row | {"removed": [{"value": f"{value:g}", "documents": f"{count:,}", "own": value == row["threshold"]}
                                          for value, count in row["removed"]]} for row in table["thresholds"]],
    }  # fmt: skip


def time(facts: Facts, hourly_cost: float, currency: str) -> dict[str, Any]:
    """Seconds by area, and each stage's work. A stage costs its share of the machine for as long as it ran."""
    size, records = parameter_count(facts), ordered(facts)
    seconds: dict[str, float] = {}
    cores = max(record.get("threads", 1) for record in records)
    stages = []
    for record in records:
        done = work(record, size)
        area = record["stage"].split(".")[0]
        seconds[area] = seconds.get(area, 0.0) + done["seconds"]
        stages.append({
            "name": record["name"], "stage": record["stage"], "address": record["fingerprint"][:12],
            "seconds": f"{done['seconds']:.1f}", "threads": record.get("threads", 1),
            "tokens": f"{done['tokens']:,.0f}" if done["tokens"] else "", "flops": _scientific(done["flops"]),
            "cost": f"{hourly_cost * done['core_seconds'] / cores / 3600:,.4f} {currency}",
        })  # fmt: skip
    total = sum(seconds.values()) or 1.0
    by_area = [
        {"area": area, "seconds": round(s, 3), "time": clock(s), "share": percent(s / total)}
        for area, s in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    drawn = {record["stage"].split(".")[0] for record in facts.records.values() if record["kind"] not in HIDDEN}
    return {"by_area": by_area, "stages": stages, "priced": hourly_cost > 0,
            "areas": [a for a in AREAS if a in drawn]}  # fmt: skip


def _scientific(number: float) -> str:
    digits, exponent = f"{number:.1e}".split("e")
    return f"{digits}e{int(exponent)}" if number else ""
