"""Lineage from the records alone: why an artifact is what it is, how two differ, and whether all of it is intact."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flows.step import ancestors
from stages import stage as stages
from stages.stage import CuveeError
from stages.store import record as records

AGAIN = "was made again since: the same files under another record"


def find(store: Any, name: str) -> dict[str, Any]:
    """The record behind an alias, a fingerprint or the unique beginning of one (at least 4 digits)."""
    aliases = store.aliases()
    fingerprint = aliases.get(name)
    if fingerprint is None and len(name) >= 4:
        matches = [fp for fp in store.fingerprints() if fp.startswith(name)]
        if len(matches) > 1:
            raise CuveeError(f"{name!r} is the beginning of {len(matches)} addresses; give more digits")
        fingerprint = matches[0] if matches else None
    record = store.record(fingerprint) if fingerprint else None
    if record is None:
        if not aliases:
            raise CuveeError(f"the store {store.uri} holds no artifact yet; make some with `cuvee run`, or name the "
                             "folder where they are: CUVEE_STATE")
        raise CuveeError(f"artifact {stages.unknown(name, list(aliases))}")
    return record


def why(store: Any, record: dict[str, Any]) -> Iterator[str]:
    """The tree of what made an artifact; an ancestor that was shown already is only named."""
    tree, seen = ancestors(store, [record]), set()

    def walk(one: dict[str, Any], label: str, indent: str) -> Iterator[str]:
        again = one["fingerprint"] in seen
        seen.add(one["fingerprint"])
        shown = " (above)" if again else f"  {one['stage']}  {one['ended'][:19]}  {one['seconds']:.1f} s"
        yield f"{indent}{label}{one['name']} {one['fingerprint'][:12]}{shown}"
        if again:
            return
        metrics = "  ".join(f"{k}={v:.4g}" for k, v in list(one["metrics"].items())[:6])
        if metrics:
            yield f"{indent}    {metrics}"
        for arg, parent in records.parents(one):
            yield from walk(tree[parent["fingerprint"]], f"{arg}: ", indent + "  ")

    yield from walk(record, "", "")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, old value, new value) for each field of the fingerprint in which two records differ, inputs last."""
    found = []
    for part in ("stage", "version", "config", "external", "inputs"):
        a, b = ((records.input_fingerprints(r["inputs"]) if part == "inputs" else r[part]) for r in (old, new))
        a, b = flatten(a, part), flatten(b, part)
        found += [(k, a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    return found


def diff(store: Any, a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """Which fields made two artifacts differ, followed down to the inputs where the difference began."""
    tree, seen = ancestors(store, [a, b]), set()

    def walk(x: dict[str, Any], y: dict[str, Any], indent: str) -> Iterator[str]:
        if (x["fingerprint"], y["fingerprint"]) in seen:
            return
        seen.add((x["fingerprint"], y["fingerprint"]))
        yield f"{indent}{x['name']} {x['fingerprint'][:12]} | {y['name']} {y['fingerprint'][:12]}"
        for field, old, new in changes(x, y):
            if not field.startswith("inputs."):
                yield f"{indent}  {field}: {_short(old)} -> {_short(new)}"
        above_x, above_y = dict(records.parents(x)), dict(records.parents(y))
        for arg in sorted(above_x.keys() | above_y.keys()):
            p, q = above_x.get(arg), above_y.get(arg)
            if p is None or q is None:
                yield f"{indent}  input {arg}: only in the {'second' if p is None else 'first'}"
            elif p["fingerprint"] != q["fingerprint"]:
                yield f"{indent}  input {arg} differs:"
                yield from walk(tree[p["fingerprint"]], tree[q["fingerprint"]], indent + "    ")

    if a["fingerprint"] == b["fingerprint"]:
        yield f"{a['name']} and {b['name']} are one artifact ({a['fingerprint'][:12]})"
    else:
        yield from walk(a, b, "")


def verify(store: Any, record: dict[str, Any]) -> Iterator[str]:
    """Every defect found in an artifact and all its ancestors; nothing if all is intact.

    Checked for each: the record's own bytes and digest, that its fingerprint follows from its fields, that its inputs
    are those that were used, and the SHA-256 of every file. A line that ends with AGAIN is no defect.
    """
    tree = ancestors(store, [record])
    with ThreadPoolExecutor(2) as pool:
        for defects in pool.map(lambda one: list(_defects(store, one, tree)), tree.values()):
            yield from defects


def _defects(store: Any, record: dict[str, Any], tree: dict[str, dict[str, Any]]) -> Iterator[str]:
    who = f"{record['name']} {record['fingerprint'][:12]}"
    mark, found = store.contents(record["fingerprint"])
    if mark != records.dumps(records.seal(record)):
        yield f"{who}: {records.NAME} is not what was sealed"
    made_by = records.fingerprint(record["stage"], record["version"], record["config"], record["external"],
                                  records.input_fingerprints(record["inputs"]))
    if made_by != record["fingerprint"]:
        yield f"{who}: the fingerprint does not follow from the record's fields ({made_by[:12]})"
    for arg, parent in records.parents(record):
        now = tree[parent["fingerprint"]]
        if now["digest"] != parent["digest"]:
            again = records.content(now) == parent.get("content") and now["ended"] > record["ended"]
            yield f"{who}: input {arg} {AGAIN if again else 'is not the artifact that was used (its record changed)'}"
    for name in sorted(found.keys() | record["files"].keys()):
        if name not in found:
            yield f"{who}: {name} is missing"
        elif name not in record["files"]:
            yield f"{who}: {name} is not in the record"
        elif found[name] != record["files"][name]["sha256"]:
            yield f"{who}: {name} was changed (its SHA-256 is not the recorded one)"


def _short(value: Any, length: int = 80) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= length else text[: length - 1] + "…"
