"""The model card: front matter, recipe, data, evaluation, limits; nothing that no record says."""

from __future__ import annotations

from typing import Any

from stages.report.charts import clock, label, percent
from stages.report.facts import Facts, busy, gains, origin, parameter_count, retention, work


def card(facts: Facts, license: str, extras: dict[str, Any]) -> str:
    """The card of the final model in Markdown. extras: "corpus" (table.json) and "parity", either may be None."""
    final = facts.final.record
    chain = recipe(final, facts.records)
    parts = [
        front_matter(license, extras.get("corpus"), family(chain), chain),
        f"# {facts.final.name}\n",
        f"A decoder of {parameter_count(facts):,} parameters ({family(chain)}), address `{final['fingerprint']}`.\n",
        "## How it was made\n",
        steps(chain),
        _totals(facts),
        "## Data\n",
        _data(extras.get("corpus")),
        "## Evaluation\n",
        _evaluation(facts),
        "## Limits\n",
        _limits(facts, extras),
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def front_matter(license: str, corpus: dict[str, Any] | None, family: str, chain: list[dict[str, Any]]) -> str:
    """YAML for a model hub. Languages are those of the training documents."""
    languages = (
        sorted({r["language"] for r in corpus["rows"] if r["outcome"] == "train" and r["language"]}) if corpus else []
    )
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", f"license: {license}"]
    lines += ["tags:", f"- {family}", *["- merge"] * any(record["stage"] == "merge.soup" for record in chain)]
    if languages:
        lines += ["language:", *(f"- '{language}'" for language in languages)]  # quoted: YAML reads a bare no as false
    return "\n".join([*lines, "---", ""])


def recipe(record: dict[str, Any], records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The chain of checkpoints from the first to `record`."""
    found = [record]
    while (above := origin(found[-1])) in records:
        found.append(records[above or ""])
    return found[::-1]


def family(chain: list[dict[str, Any]]) -> str:
    """The architecture, as Hugging Face calls it, from the sizes that the first stage of the chain was given."""
    return chain[0]["config"].get("model", {}).get("family", "unknown")


def steps(chain: list[dict[str, Any]]) -> str:
    """The table of the stages that the weights went through."""
    rows = [[f"`{r['name']}`", r["stage"], f"{r['seconds']:.1f}", _blend(r) + _settings(r["config"])] for r in chain]
    return table(["artifact", "stage", "seconds", "configuration"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in lines) + "\n"


def _blend(record: dict[str, Any]) -> str:
    """What a merge blended, with the weights that its configuration gives."""
    merged = record["stage"] == "merge.soup"
    models, weights = record["inputs"].get("models", {}) if merged else {}, record["config"].get("weights", {})
    named = (f"{name} × {weights[name]:g}" if name in weights else name for name in models)
    return f"of {' + '.join(named)}; " if models else ""


def _settings(config: dict[str, Any]) -> str:
    plain = {
        key: value for key, value in config.items() if isinstance(value, (int, float, str)) and value not in ("", 0)
    }
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in plain.items()
    )


def _totals(facts: Facts) -> str:
    records = list(facts.records.values())
    done = [work(record, parameter_count(facts)) for record in records]
    elapsed = sum(end - start for start, end in busy(records))
    return (f"All {len(records)} artifacts behind it: {sum(d['tokens'] for d in done):,.0f} training tokens, "
            f"{clock(elapsed)} ({sum(d['core_seconds'] for d in done) / 3600:.2f} core hours), "
            f"{sum(d['flops'] for d in done):.2e} floating-point operations.\n")  # fmt: skip


def _data(corpus: dict[str, Any] | None) -> str:
    if not corpus:
        return "The corpus was not given to this report.\n"
    sums: dict[tuple[str, str], list[int]] = {}
    for row in corpus["rows"]:
        outcome = row["outcome"] if row["outcome"] in ("train", "heldout") else "removed"
        one = sums.setdefault((row["source"], row["domain"]), [0, 0, 0, 0])
        one[("train", "heldout", "removed").index(outcome)] += row["documents"]
        one[3] += row["bytes"] if outcome == "train" else 0
    rows = [
        [source, domain, *map(str, one[:3]), f"{one[3] / 1e6:.2f}"] for (source, domain), one in sorted(sums.items())
    ]
    return table(["source", "domain", "train documents", "held out", "removed", "train MB"], rows)


def _evaluation(facts: Facts) -> str:
    names = facts.spine
    rows = []
    for domain in facts.domains:
        cells = []
        for name in names:
            value, low, high = facts.models[name].score(domain)
            cells.append(f"{percent(value)} ({percent(low)}–{percent(high)})")
        rows.append([label(domain), *cells])
    rows.append(["mean", *(percent(facts.models[name].mean(facts.domains)[0]) for name in names)])
    settings, n = facts.final.scores["engine"], facts.final.scores["domains"][facts.domains[0]]["n"]
    text = (f"Mean score in percent on held-out prompts (95 % Wilson interval), {n} prompts a domain, greedy, at most "
            f"{settings['max_new_tokens']} new tokens:\n\n" + table(["domain", *names], rows))  # fmt: skip
    held = [f"- {row['soup']}, {label(row['domain'])}: " + ("the expert has no sure gain" if row["share"] is None
            else f"{percent(row['share'])} % of {row['expert']}'s gain kept") for row in retention(facts)]  # fmt: skip
    loss = facts.final.scores["perplexity"]
    lines = [
        f"- {label(d)}: {one['bits_per_byte']:.3f} bits a byte, {one['nats_per_token']:.3f} nats a token"
        for d, one in loss.items()
    ]
    text += "\nRetention of the experts' gains:\n\n" + "\n".join(held) + "\n" if held else ""
    return text + ("\nHeld-out text:\n\n" + "\n".join(lines) + "\n" if lines else "")


def _limits(facts: Facts, extras: dict[str, Any]) -> str:
    lines = []
    weak = [(label(d), facts.final.score(d)) for d in facts.domains if facts.final.score(d)[0] < 0.5]
    for domain, (value, low, high) in weak:
        lines.append(
            f"- {domain}: {percent(value)} % ({percent(low)}–{percent(high)}); more than half of the score is missing."
        )
    flat = [row["model"] for row in gains(facts) if row["mean"][1] <= 0 <= row["mean"][2]]
    if flat:
        lines.append(f"- In the mean over the domains, {', '.join(flat)} can't be told from the model before.")
    lines.append(
        "- Scores are verifiers' judgements of generated tasks; other tasks and human judgement were not measured."
    )
    if parity := extras.get("parity"):
        lines.append(limits_of(parity))
    return "\n".join(lines) + "\n"


def limits_of(parity: dict[str, float]) -> str:
    """What the export's check of logits says."""
    window = f" with a window of {parity['sliding_window']:.0f}" if parity["sliding_window"] else ""
    return (
        f"- The exported weights give the trainer's logits within {parity['max_abs_difference']:.1e} (logit scale 1, "
        f"FP32, on sequences of up to {parity['longest']:.0f} tokens{window})."
    )
