"""The HTML page: facts laid out as tables and figures, with sentences that say what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from stages.report import charts, judging, tables
from stages.report.charts import clock, label, percent, share
from stages.report.facts import Facts, busy, gains, parameter_count, retention, win_rates, work
from stages.report.lineage import draw

HERE = Path(__file__).parent


def page(
    facts: Facts, claimed: list[dict[str, Any]], title: str, hourly_cost: float, currency: str, extras: dict[str, Any]
) -> str:
    """The whole page. extras: "corpus" (table.json), "parity" (parity.json), "judged" (judged.json); any may be None."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    values = context(facts, claimed, title, hourly_cost, currency, extras)
    return environment.get_template("page.jinja").render(style=style, **values)


def context(
    facts: Facts, claimed: list[dict[str, Any]], title: str, hourly_cost: float, currency: str, extras: dict[str, Any]
) -> dict[str, Any]:
    """Every value that the template names."""
    gained, held, wins = gains(facts), retention(facts), win_rates(facts)
    judged = extras.get("judged")
    soups = list(dict.fromkeys(row["soup"] for row in held))
    first = facts.final.scores
    prompts = {int(one["n"]) for one in first["domains"].values()}
    curves = [r for r in tables.ordered(facts) if len((r.get("series") or {}).get("loss", [])) > 1]
    long_domains = [d for d in facts.domains if first["lengths"].get(d) and len(first["lengths"][d]) > 1]
    found = {
        "title": title, "final": facts.final.name, "spine": facts.spine, "domains": [label(d) for d in facts.domains],
        "headline": headline(facts), "lede": lede(facts), "tiles": tiles(facts, hourly_cost, currency, extras),
        "matrix": tables.matrix(facts), "has_experts": bool(facts.soups()), "engine": first["engine"],
        "per_domain": "–".join(str(n) for n in sorted({min(prompts), max(prompts)})),
        "claims": tables.claim_rows(claimed), "judged": judged and judging.figure(judged),
        "gains": tables.gain_rows(facts, gained), "trajectories": gained and charts.trajectories(facts),
        "kept": held and charts.kept(held, soups), "angles": tables.angles(facts),
        "wins": wins and charts.win_rates(wins, facts.final.name),
        "lengths": [(label(d), charts.lengths(facts, d)) for d in long_domains],
        "text_domains": [label(d) for d in sorted(first["perplexity"])], "perplexity": tables.perplexity(facts),
        "curves": curves and charts.curves(curves), "samples": tables.samples(facts),
        "lineage": draw(facts.records), "data": tables.corpus(extras.get("corpus")),
        "timeline": charts.timeline(tables.ordered(facts)), **tables.time(facts, hourly_cost, currency),
        "contaminated": {label(d): why for d, why in sorted(first.get("contaminated", {}).items())},
        "digests": first["digests"], "environment": facts.final.record.get("environment", {}),
        "says": {
            "matrix": say_matrix(facts), "claims": say_claims(claimed), "judged": judged and judging.say(judged),
            "gains": say_gains(gained), "retention": say_retention(held),
            "wins": say_wins(wins, facts, judged), "lengths": [say_lengths(facts, d) for d in long_domains],
            "perplexity": say_perplexity(facts), "lineage": say_lineage(facts), "time": say_time(facts),
            "data": say_data(extras.get("corpus")),
        },
    }  # fmt: skip
    sections = [
        ("matrix", "Models and domains", True), ("claims", "What it must show", found["claims"]), ("gains", "Gains", found["gains"]),
        ("retention", "Soups", found["kept"]),
        ("wins", "Win rates", found["wins"]), ("judge", "Reward model", judged), ("length-1", "Length", found["lengths"]),
        ("perplexity", "Held-out loss", found["perplexity"]), ("curves", "Curves", found["curves"]),
        ("samples", "Samples", found["samples"]), ("lineage", "Lineage", True), ("data", "Data", found["data"]),
        ("time", "Time and cost", True),
    ]  # fmt: skip
    return found | {"contents": [(id_, name) for id_, name, there in sections if there]}


def headline(facts: Facts) -> str:
    experts = {expert.name for _, some in facts.soups() for expert in some.values()}
    blend = f", blended from {len(experts)} experts" if experts else ""
    return f"{facts.final.name.capitalize()}: a language model of {count(parameter_count(facts))} parameters{blend}"


def lede(facts: Facts) -> Markup:
    mean, low, high = facts.final.mean(facts.domains)
    start = facts.models[facts.spine[0]].mean(facts.domains)[0]
    return Markup(
        "It scores <b>{}</b> on held-out prompts of {} (95\u202f%: {}–{}); {} scored {}. Everything on this page comes "
        "from the records of the {} artifacts it was made from."
    ).format(share(mean), plural(len(facts.domains), "domain"), percent(low), percent(high), facts.spine[0],
             share(start), len(facts.records))  # fmt: skip


def tiles(facts: Facts, hourly_cost: float, currency: str, extras: dict[str, Any]) -> list[tuple[str, str]]:
    records, size = list(facts.records.values()), parameter_count(facts)
    elapsed = sum(end - start for start, end in busy(records))
    done = [work(record, size) for record in records]
    found = [
        (count(size), "parameters"),
        (count(sum(one["tokens"] for one in done)), "training tokens, all stages"),
        (clock(elapsed), "from raw text to this page"),
        (f"{sum(one['core_seconds'] for one in done) / 3600:.2f}", "core hours"),
        (operations(sum(one["flops"] for one in done)), "floating-point operations"),
        (f"{share(facts.final.mean(facts.domains)[0])}", f"mean of {plural(len(facts.domains), 'domain')}"),
    ]
    if parity := extras.get("parity"):
        found.append((power(parity["max_abs_difference"]), "largest logit difference after export"))
    if hourly_cost:
        found.append((f"{hourly_cost * elapsed / 3600:,.2f} {currency}", f"at {hourly_cost:g} {currency} an hour"))
    return found


def count(number: float) -> str:
    """1,311,872 as 1.31 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def operations(number: float) -> str:
    for size, unit in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if number >= size:
            return f"{number / size:.3g} {unit}FLOP"
    return f"{number:.3g} FLOP"


def power(number: float) -> str:
    """1.9e-06 as 1.9 × 10⁻⁶."""
    digits, exponent = f"{number:.1e}".split("e")
    return f"{digits}\u202f×\u202f10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def plural(number: int, name: str) -> str:
    words = "no one two three four five six seven eight nine ten".split()
    return f"{words[number] if number < len(words) else number} {name}{'' if number == 1 else 's'}"


def say_matrix(facts: Facts) -> str:
    scores = {domain: facts.final.score(domain)[0] for domain in facts.domains}
    best, worst = max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)
    if best == worst:
        return f"The final model, {facts.final.name}, scores {share(scores[best])} in every domain."
    return (
        f"The final model, {facts.final.name}, is best at {label(best)} ({share(scores[best])}) and weakest at "
        f"{label(worst)} ({share(scores[worst])})."
    )


def say_gains(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    top = max(rows, key=lambda row: row["mean"][0])
    sure = [row["model"] for row in rows if row["mean"][1] > 0]
    lost = [row["model"] for row in rows if row["mean"][2] < 0]
    flat = [row["model"] for row in rows if row["mean"][1] <= 0 <= row["mean"][2]]
    text = f"The largest step is {top['model']}: {100 * top['mean'][0]:+.1f} points in the mean. "
    text += (
        f"The mean rises beyond its interval with {listed(sure)}"
        if sure
        else "No step raises the mean beyond its interval"
    )
    text += f"; it falls with {listed(lost)}" if lost else ""
    return text + (f"; {listed(flat)} can't be told from no change." if flat else ".")


def say_claims(rows: list[dict[str, Any]]) -> str:
    shown = sum(row["shown"] for row in rows)
    missed = [f"{row['claim']} on {label(row['on'])}" for row in rows if not row["shown"]]
    return f"{shown} of {len(rows)} are shown" + (f"; not shown: {listed(missed)}." if missed else ".")


def say_retention(rows: list[dict[str, Any]]) -> str:
    text = []
    for soup in dict.fromkeys(row["soup"] for row in rows):
        mine = [row for row in rows if row["soup"] == soup]
        sure = [row for row in mine if row["share"] is not None]
        if not sure:
            text.append(f"No expert behind {soup} gained beyond its interval, so there is no gain to keep.")
            continue
        mean = sum(row["share"] for row in sure) / len(sure)
        least = min(sure, key=lambda row: row["share"])
        text.append(
            f"In {soup} {share(mean)} of the experts' gains are left, on average over {plural(len(sure), 'domain')} "
            f"with a sure gain; least in {label(least['domain'])} ({share(least['share'])})."
        )
    return " ".join(text)


def say_wins(rows: list[dict[str, Any]], facts: Facts, judged: dict[str, Any] | None) -> str:
    if not rows:
        return ""
    value, low, high = rows[-1]["final"]
    trust = f" The reward model itself orders {share(judged['accuracy'])} of its held-out pairs rightly." if judged else ""
    return (
        f"Against {rows[-1]['model']}, {facts.final.name} wins {share(value)} ({percent(low)}–{percent(high)}); "
        f"against {rows[0]['model']} {share(rows[0]['final'][0])}.{trust}"
    )


def say_lengths(facts: Facts, domain: str) -> str:
    some = facts.final.scores["lengths"][domain]
    sizes = sorted(some, key=int)
    short, long = some[sizes[0]]["mean"], some[sizes[-1]]["mean"]
    return (
        f"With {int(sizes[0]):,} characters of text {facts.final.name} scores {share(short)}, "
        f"with {int(sizes[-1]):,} {share(long)}."
    )


def say_perplexity(facts: Facts) -> str:
    first, last = (facts.models[name].scores["perplexity"] for name in (facts.spine[0], facts.spine[-1]))
    rises = [f"{label(d)} {first[d]['bits_per_byte']:.2f} → {last[d]['bits_per_byte']:.2f}" for d in sorted(first)]
    return f"From {facts.spine[0]} to {facts.final.name}, in bits a byte: {', '.join(rises)}."


def say_lineage(facts: Facts) -> str:
    kinds = [record["kind"] for record in facts.records.values()]
    names = {"checkpoint": ("checkpoint", ""), "pairs": ("set", " of sampled completions"), "scores": ("evaluation", "")}
    parts = [plural(kinds.count(kind), name) + rest for kind, (name, rest) in names.items() if kind in kinds]
    return f"{len(kinds)} artifacts stand behind this report, among them {listed(parts)}. Evaluations are not drawn."


def say_time(facts: Facts) -> str:
    records = list(facts.records.values())
    spans = busy(records)
    elapsed, total = sum(end - start for start, end in spans), sum(record["seconds"] for record in records)
    slow = max(records, key=lambda record: record["seconds"])
    pauses = f" Pauses between {len(spans)} spans of work are cut out." if len(spans) > 1 else ""
    return (f"{len(records)} stages took {clock(total)} of work in {clock(elapsed)}, side by side where they could. "
            f"The longest is {slow['name']} ({clock(slow['seconds'])}).{pauses}")  # fmt: skip


def say_data(table: dict[str, Any] | None) -> str:
    if not table:
        return ""
    kept = sum(row["documents"] for row in table["rows"] if row["outcome"] in ("train", "heldout"))
    size = sum(row["bytes"] for row in table["rows"] if row["outcome"] in ("train", "heldout"))
    gone = sum(row["documents"] for row in table["rows"]) - kept
    return (
        f"{kept:,} documents ({size / 1e6:.1f} MB) were kept and {gone:,} removed; the removed ones stay in the "
        "corpus, each with its reason."
    )


def listed(items: list[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + f" and {items[-1]}"
