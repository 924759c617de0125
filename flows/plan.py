"""The graph without running: what is done, what will run and why, and what it will take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flows.graph import Graph, Node
from flows.lineage import changes
from stages.stage import ConfigError, resolve
from stages.trainer import layout

ALIKE = 10.0  # how many times more or less work than before may be scaled from it


def state(store: Any, node: Node) -> tuple[str, str]:
    """("done", "") or ("run", why): new, or the first fields in which it differs from the artifact of that name."""
    if store.record(node.fingerprint):
        return "done", ""
    previous = store.record(store.aliases().get(node.name, "-"))
    if previous is None:
        return "run", "new"
    now = {"stage": node.stage, "version": node.module.VERSION, "config": node.identity, "external": node.external,
           "inputs": node.map_inputs(lambda n: {"fingerprint": n.fingerprint})}
    own = changes(previous, now)
    names = [f"{field.removeprefix('config.')}: {old} -> {new}" for field, old, new in own
             if not field.startswith("inputs.")]
    if names:
        return "run", "; ".join(n if len(n) < 60 else n[:59] + "…" for n in names[:3])
    changed = sorted({field.removeprefix("inputs.") for field, _, _ in own})
    return "run", "input " + ", ".join(changed) + " changed"


def predict(store: Any, node: Node, flops_per_second: float) -> float:
    """Seconds the stage will take: as long as the artifact of that name took, scaled by the work; without one, from
    the FLOPs of its tokens (6 a parameter and token to train, 2 to generate)."""
    def flops(e: Any) -> float:
        return e["parameters"] * (6.0 * e["train_tokens"] + 2.0 * e["generated_tokens"])

    work = flops(vars(node.estimate))
    previous = store.record(store.aliases().get(node.name, "-"))
    before = flops(previous["estimate"]) if previous else 0.0
    if before and 1 / ALIKE <= work / before <= ALIKE:
        return previous["seconds"] * work / before
    if previous and not work:
        return previous["seconds"]
    return work / flops_per_second


def sizes(node: Node) -> Any:
    """The ModelConfig of the model that a stage makes or uses: its own, or that of the first input that has one."""
    if not node.inputs.get("init") and hasattr(node.config, "model"):
        return node.config.model
    return next(filter(None, map(sizes, node.parents)), None)


def check_layout(node: Node, cluster: Any) -> float:
    """Bytes that the stage takes of a device of `cluster`, the most of all its phases.

    Raises ConfigError where its layout cannot be built on the cluster's devices, or does not fit their memory.
    """
    model, most = sizes(node), 0.0
    where = node.where
    if not node.distributed or model is None:
        # Generation and the like hold the weights alone, wherever there is room.
        memory = 4 * node.estimate.parameters
        if memory > cluster.memory_gib * layout.GIB * cluster.devices:
            raise ConfigError(f"{node.name}: {memory / layout.GIB:,.0f} GiB of weights do not fit the {cluster.devices} x "
                              f"{cluster.memory_gib} GiB of cluster={cluster.name}; choose a smaller model or a larger "
                              "cluster")
        return memory
    for config, length in phases(node.config):
        layout.check(config, model, cluster.devices, cluster.device, where, length)
        layout.check_batch(config, cluster.devices, length, where)
        reference = resolve("objectives", getattr(node.config, "objective", "ce")).NEEDS_REFERENCE
        found = layout.memory(config, model, cluster.devices, length, reference)
        if found.total > cluster.memory_gib * layout.GIB:
            raise ConfigError(f"{where}: sequences of {length} take {found.total / layout.GIB:,.1f} GiB of a device "
                              f"({found.describe()}), but cluster={cluster.name} has {cluster.memory_gib}; "
                              f"{found.advice(config, cluster.devices)}")
        most = max(most, found.total)
    return most


def phases(config: Any) -> Iterator[tuple[Any, int]]:
    """(configuration as placed, sequence length) of each phase of a training stage."""
    step = 0
    for length, steps in config.plan() if hasattr(config, "plan") else [(config.sequence_length, config.steps)]:
        yield config.placed(step), length
        step += steps


def table(store: Any, graph: Graph, nodes: list[Node]) -> Iterator[str]:
    """The plan as text; memory is of one device. Raises ConfigError when a stage can't run on the cluster's devices."""
    cluster = graph.conf.cluster
    yield f"{'stage':<24}{'address':<14}{'state':<6}{'tokens':>10}{'memory':>10}{'storage':>10}{'time':>9}  why"
    total, seconds, storage = 0, 0.0, 0.0
    for node in nodes:
        doing, why = state(store, node)
        estimate = node.estimate
        tokens = estimate.train_tokens + estimate.generated_tokens
        memory = check_layout(node, cluster)
        keeps = 4 * estimate.parameters if node.kind.value in ("checkpoint", "reward_model", "export") else 0
        took = predict(store, node, cluster.flops_per_second) if doing == "run" else 0.0
        if doing == "run":
            total, seconds, storage = total + 1, seconds + took, storage + keeps
        yield (f"{node.name:<24}{node.fingerprint[:12]:<14}{doing:<6}{_count(tokens):>10}{_bytes(memory):>10}"
               f"{_bytes(keeps):>10}{_time(took) if doing == 'run' else '':>9}  {why}")
    cost = seconds / 3600 * cluster.price_per_hour
    yield ""
    yield (f"{total} of {len(nodes)} stages will run; about {_time(seconds)} of stage time on cluster={cluster.name}, "
           f"{_bytes(storage)} of storage, {cost:,.2f} {cluster.currency}" if total else
           f"all {len(nodes)} stages are made; nothing will run")


def dry_run(graph: Graph, nodes: list[Node]) -> Iterator[str]:
    """What the cluster itself says to the jobs that it would get; nothing where stages start without one.

    Raises CuveeError with its reason where it refuses them.
    """
    cluster = graph.conf.cluster
    if cluster.launcher != "kubernetes":
        return
    from flows.launchers import kubernetes

    stages = [
        kubernetes.Stage(
            name=f"{kubernetes.title(node.name, node.fingerprint)}-0", spec=f"{cluster.volume.path}/work/spec.json",
            digest="0", threads=cluster.cores, hosts=cluster.hosts if node.distributed else 1,
            processes=cluster.devices if node.distributed else 1, device=cluster.device if node.needs_device else "cpu",
        )
        for node in nodes
    ]  # fmt: skip
    yield kubernetes.dry_run(cluster, stages)


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}" if number else "-"


def _bytes(number: float) -> str:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return "-"


def _time(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"
