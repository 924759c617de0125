"""The graph without running: what is done, what will run and why, and what it will take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from flows import together
from flows.graph import Graph, Node
from flows.lineage import changes
from stages.stage import ConfigError, resolve
from stages.trainer import layout

ALIKE = 10.0  # how many times more or less work than before may be scaled from it


def known(store: Any, nodes: list[Node]) -> list[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """Of each node (its artifact's record, the record that its name stands for), None where there is none."""
    aliases = store.aliases()
    before = [aliases.get(node.name) for node in nodes]
    wanted = {node.fingerprint for node in nodes} | {fingerprint for fingerprint in before if fingerprint}
    records = dict(zip(wanted, together(store.record, wanted), strict=True))
    return [(records[node.fingerprint], records.get(old)) for node, old in zip(nodes, before, strict=True)]


def why(node: Node, previous: dict[str, Any] | None) -> str:
    """Why a stage runs: new, or the first fields in which it differs from `previous`, the artifact of that name."""
    if previous is None:
        return "new"
    now = {"stage": node.stage, "version": node.module.VERSION, "config": node.identity, "external": node.external,
           "inputs": node.map_inputs(lambda n: {"fingerprint": n.fingerprint})}
    own = changes(previous, now)
    names = [f"{field.removeprefix('config.')}: {old} -> {new}" for field, old, new in own
             if not field.startswith("inputs.")]
    if names:
        return "; ".join(n if len(n) < 60 else n[:59] + "…" for n in names[:3])
    names = sorted({field.removeprefix("inputs.") for field, _, _ in own})
    more = f" and {len(names) - 3} others" if len(names) > 4 else ""
    return f"input {', '.join(names[:3] if more else names)}{more} changed"


def predict(node: Node, previous: dict[str, Any] | None, flops_per_second: float) -> tuple[float, bool]:
    """(seconds the stage will take, whether they come from a run): as long as `previous`, the artifact of that name, took,
    scaled by the work; without one, from the FLOPs of its tokens (6 a parameter and token to train, 2 to generate)."""
    def flops(e: Any) -> float:
        return e["parameters"] * (6.0 * e["train_tokens"] + 2.0 * e["generated_tokens"])

    work = flops(vars(node.estimate))
    before = flops(previous["estimate"]) if previous else 0.0
    if before and 1 / ALIKE <= work / before <= ALIKE:
        return previous["seconds"] * work / before, True
    if previous and not work:
        return previous["seconds"], True
    return work / flops_per_second, False


def sizes(node: Node) -> Any:
    """The ModelConfig of the model that a stage makes or uses: its own, or that of the first input that has one; its context
    as far as training has extended it."""
    own = not node.inputs.get("init") and hasattr(node.config, "model")
    found = node.config.model if own else next(filter(None, map(sizes, node.parents)), None)
    if found is None or not hasattr(node.config, "plan"):
        return found
    longest = max(length for length, _ in node.config.plan())
    return replace(found, max_position_embeddings=max(found.max_position_embeddings, longest))


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
        objective = resolve("objectives", getattr(node.config, "objective", "ce"))
        found = layout.memory(config, model, cluster.devices, length, objective.NEEDS_REFERENCE)
        if getattr(objective, "NEEDS_VALUES", False):  # a value network of the same sizes, trained in turn with the policy
            critic = layout.memory(config, model, cluster.devices, length)
            found = replace(found, weights=found.weights + critic.weights, gradients=found.gradients + critic.gradients,
                            optimizer=found.optimizer + critic.optimizer)
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
    cluster, wide = graph.conf.cluster, max(24, 1 + max(len(node.name) for node in nodes))
    yield f"{'stage':<{wide}}{'address':<14}{'state':<6}{'tokens':>10}{'memory':>10}{'storage':>10}{'time':>9}  why"
    total, seconds, storage, guessed = 0, 0.0, 0.0, 0.0
    asking: dict[str, int] = {}
    for node, (made, previous) in zip(nodes, known(store, nodes), strict=True):
        doing, reason = ("done", "") if made else ("run", why(node, previous))
        estimate = node.estimate
        tokens = estimate.train_tokens + estimate.generated_tokens
        memory = check_layout(node, cluster)
        keeps = 4 * estimate.parameters if node.kind.value in ("checkpoint", "reward_model", "export") else 0
        took, measured = (0.0, True) if made else predict(node, previous, cluster.flops_per_second)
        guessed += 0.0 if measured else took
        if not made:
            total, seconds, storage = total + 1, seconds + took, storage + keeps
            asking |= {node.name: estimate.requests} if estimate.requests else {}
        yield (f"{node.name:<{wide}}{node.fingerprint[:12]:<14}{doing:<6}{_count(tokens):>10}{_bytes(memory):>10}"
               f"{_bytes(keeps):>10}{'' if made else _time(took) if took else '-':>9}  {reason}")
    if not total:
        yield from ("", f"all {len(nodes)} stages are made; nothing will run")
        return
    price = cluster.price_per_hour
    time = f"about {_time(seconds)} of stage time" if seconds else "how long is known once they have run"
    cost = f", {seconds / 3600 * price:,.2f} {cluster.currency}" if price and seconds else ""  # unknown is not free
    yield ""
    yield (f"{total} of {len(nodes)} stages will run; {time} on cluster={cluster.name}, "
           f"{_bytes(storage)} of storage{cost}")
    if asking:
        yield ("teachers are asked, in requests at most: " + ", ".join(f"{name} {count:,}" for name, count in asking.items())
               + "; what they charge comes on top (a budget limits it)")
    if guessed:
        yield (f"{_time(guessed)} of it from cluster.flops_per_second, not from a run: with full sequences in post-training, "
               "without starts and loading")


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
    return _scaled(number, {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3, "": 1})


def _bytes(number: float) -> str:
    return _scaled(number, {" TiB": 2**40, " GiB": 2**30, " MiB": 2**20, " KiB": 2**10})


def _scaled(number: float, units: dict[str, float]) -> str:
    """Three digits in the largest unit, never with an exponent: 1023 MiB are 1020 MiB."""
    return next((f"{float(f'{number / size:.3g}'):g}{unit}" for unit, size in units.items() if number >= size), "-")


def _time(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"
