"""What the report says, computed from records and scores: the chain of models, gains, retention, win rates, work."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from stages.evaluation.stats import paired, win_rate
from stages.rollout._collect import read_jsonl
from stages.stage import Artifact, CuveeError

INTERRUPTION = 30.0  # seconds in which nothing ran
Interval = tuple[float, float, float]  # value, low, high: 95 %


@dataclass
class Model:
    """An evaluated model. `record`: its checkpoint's. `parent`: the evaluated model that it was made from."""

    name: str
    record: dict[str, Any]
    scores: dict[str, Any]
    samples: dict[str, dict[str, Any]]  # prompt id -> sample
    parent: str | None = None

    def score(self, domain: str) -> Interval:
        one = self.scores["domains"][domain]
        return one["mean"], one["low"], one["high"]

    def mean(self, domains: list[str]) -> Interval:
        """Unweighted mean of the domains."""
        return average([self.score(domain) for domain in domains])


@dataclass
class Facts:
    """records: fingerprint -> record of everything the report's inputs were made from. spine: from the first evaluated
    model to the final one, each trained or merged from the one before; the experts stand beside it."""

    records: dict[str, dict[str, Any]]
    models: dict[str, Model]
    domains: list[str]
    spine: list[str]

    @property
    def final(self) -> Model:
        return self.models[self.spine[-1]]

    def soups(self) -> list[tuple[Model, dict[str, Model]]]:
        """(soup, {input name: expert}) for each merge on the spine, with those of its experts that were evaluated."""
        by_print = {model.record["fingerprint"]: model for model in self.models.values()}
        found = []
        for name in self.spine:
            if self.models[name].record["stage"] != "merge.soup":
                continue
            parts = {arg: by_print.get(fp) for arg, fp, _ in parents(self.models[name].record)}
            experts = {
                arg.split(".", 1)[1]: model for arg, model in parts.items() if arg.startswith("models.") and model
            }
            if experts:
                found.append((self.models[name], experts))
        return found


def collect(scores: dict[str, Artifact], others: list[Artifact]) -> Facts:
    """Read the SCORES artifacts and the records of all ancestors. Raises CuveeError for scores of different prompts."""
    records: dict[str, dict[str, Any]] = {}
    for artifact in [*scores.values(), *others]:
        records |= artifact.record.get("ancestors", {})
        records[artifact.fingerprint] = {k: v for k, v in artifact.record.items() if k not in ("ancestors", "files")}
    models = {}
    for name, artifact in scores.items():
        checkpoint = artifact.record["inputs"]["model"]["fingerprint"]
        rows = read_jsonl(artifact.path / "samples.jsonl")
        found = json.loads((artifact.path / "scores.json").read_text(encoding="utf-8"))
        models[name] = Model(name, records[checkpoint], found, {row["id"]: row for row in rows})
    require_same_basis(models)
    by_print = {model.record["fingerprint"]: name for name, model in models.items()}
    for model in models.values():
        model.parent = _parent(model.record, records, by_print)
    domains = sorted(next(iter(models.values())).scores["domains"])
    return Facts(records, models, domains, _spine(models, others))


def require_same_basis(models: dict[str, Model]) -> None:
    """Raises CuveeError for scores that can't stand in one table: other prompts, template, tokenizer or engine."""
    (first, a), *others = models.items()
    for name, b in others:
        for part in ("digests", "engine"):
            x, y = a.scores[part], b.scores[part]
            if x != y:
                odd = next(key for key in sorted(x | y) if x.get(key) != y.get(key))
                raise CuveeError(
                    f"scores of {name} and {first} differ in {part}.{odd} and can't be compared; "
                    "evaluate all models with one configuration, prompts and tokenizer"
                )


def parents(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(argument or "argument.key", fingerprint, kind) of each input of a record."""
    found = []
    for arg, one in record.get("inputs", {}).items():
        items = {arg: one} if "fingerprint" in one else {f"{arg}.{key}": item for key, item in one.items()}
        found += [(name, item["fingerprint"], item["kind"]) for name, item in items.items()]
    return found


def origin(record: dict[str, Any]) -> str | None:
    """Fingerprint of the checkpoint whose weights this one continues: the chosen one, `init`, a soup's `base`, else the
    first one."""
    models = {arg: fp for arg, fp, kind in parents(record) if kind == "checkpoint"}
    if record.get("stage") == "evaluation.choose":
        chosen = next(name for name, value in record["metrics"].items() if name.startswith("chosen/") and value)
        name = chosen.removeprefix("chosen/")
        return models["start" if name == "start" else f"models.{name}"]
    return models.get("init") or models.get("base") or next(iter(models.values()), None)


def _parent(record: dict[str, Any], records: dict[str, Any], evaluated: dict[str, str]) -> str | None:
    above = origin(record)
    while above in records and above not in evaluated:
        above = origin(records[above])
    return evaluated.get(above or "")


def _spine(models: dict[str, Model], others: list[Artifact]) -> list[str]:
    exported = {fp for one in others for _, fp, kind in parents(one.record) if kind == "checkpoint"}
    final = [name for name, model in models.items() if model.record["fingerprint"] in exported] or list(models)
    chain = [final[-1]]
    while parent := models[chain[-1]].parent:
        chain.append(parent)
    return chain[::-1]


def average(intervals: list[Interval]) -> Interval:
    """Mean of independent estimates; their errors below and above are added in quadrature."""
    n = len(intervals)
    value = sum(v for v, _, _ in intervals) / n
    below = sum((v - low) ** 2 for v, low, _ in intervals) ** 0.5 / n
    above = sum((high - v) ** 2 for v, _, high in intervals) ** 0.5 / n
    return value, value - below, value + above


def _columns(model: Model, other: Model, domain: str | None, field: str) -> tuple[list[float], list[float]]:
    """The two models' values of `field` on the prompts that both answered (of one domain, or of all)."""
    ids = [i for i, row in model.samples.items() if i in other.samples and domain in (None, row["domain"])]
    return [model.samples[i][field] for i in ids], [other.samples[i][field] for i in ids]


def gain(after: Model, before: Model, domain: str) -> Interval:
    """Paired difference of the scores of two models on one domain."""
    return paired(*_columns(after, before, domain, "score"))


def gains(facts: Facts) -> list[dict[str, Any]]:
    """What each step of the spine changed, per domain and in the mean, against the model before it."""
    rows = []
    for before, after in pairwise(facts.spine):
        found = {domain: gain(facts.models[after], facts.models[before], domain) for domain in facts.domains}
        rows.append({"model": after, "before": before, "domains": found, "mean": average(list(found.values()))})
    return rows


def retention(facts: Facts) -> list[dict[str, Any]]:
    """How much of each expert's gain in its own domain is left in the soup: (soup - parent) / (expert - parent).

    `share` is None where the expert's own gain is not above 0 with 95 % confidence: there is nothing to keep.
    """
    rows = []
    for soup, experts in facts.soups():
        for domain, expert in sorted(experts.items()):
            parent = facts.models.get(expert.parent or "")
            if domain not in facts.domains or parent is None:
                continue
            before, alone, blended = (model.score(domain)[0] for model in (parent, expert, soup))
            certain = gain(expert, parent, domain)[1] > 0
            rows.append({
                "soup": soup.name, "expert": expert.name, "parent": parent.name, "domain": domain,
                "before": before, "alone": alone, "blended": blended,
                "share": (blended - before) / (alone - before) if certain else None,
            })  # fmt: skip
    return rows


def win_rates(facts: Facts) -> list[dict[str, Any]]:
    """By the reward model's scores of the same prompts: the final model, and each model's successor, against each."""
    if not all("reward_model" in row for name in facts.spine for row in facts.models[name].samples.values()):
        return []

    def rate(a: str, b: str) -> Interval:
        return win_rate(*_columns(facts.models[a], facts.models[b], None, "reward_model"))

    return [
        {"model": before, "successor": after, "final": rate(facts.spine[-1], before), "next": rate(after, before)}
        for before, after in pairwise(facts.spine)
    ]


def span(record: dict[str, Any]) -> tuple[float, float]:
    """Start and end of a record in seconds since 1970."""
    return datetime.fromisoformat(record["started"]).timestamp(), datetime.fromisoformat(record["ended"]).timestamp()


def busy(records: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """The spans in which the recipe ran, in order, without interruptions; a shorter wait is the scheduler's own."""
    spans: list[tuple[float, float]] = []
    for start, end in sorted(map(span, records)):
        if spans and start <= spans[-1][1] + INTERRUPTION:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((start, end))
    return spans


def work(record: dict[str, Any], parameters: int) -> dict[str, float]:
    """Time and work of one stage. Training takes 6 N T floating-point operations (Kaplan et al. 2020), generation
    2 N T; the tokens are the stage's own count, or else its estimate."""
    start, end = span(record)
    estimate, metrics = record.get("estimate") or {}, record.get("metrics") or {}
    trained = metrics.get("tokens", estimate.get("train_tokens", 0)) if record["stage"].startswith("train.") else 0
    generated = metrics.get("generated_tokens", estimate.get("generated_tokens", 0))
    elapsed = record.get("seconds", end - start)
    return {
        "seconds": elapsed, "core_seconds": elapsed * record.get("threads", 1), "tokens": trained,
        "generated": generated, "flops": parameters * (6.0 * trained + 2.0 * generated),
    }  # fmt: skip


def parameter_count(facts: Facts) -> int:
    """Parameters of the final model, by its record or the nearest one above that states them; 0 if none does."""
    record: dict[str, Any] | None = facts.final.record
    while record:
        for found in (record.get("metrics", {}).get("parameters"), (record.get("estimate") or {}).get("parameters")):
            if found:
                return int(found)
        record = facts.records.get(origin(record) or "")
    return 0
