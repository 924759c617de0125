"""The Prefect flow: one task a stage, submitted in the recipe's order, each waiting for its inputs."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from prefect import flow, get_run_logger, runtime, tags, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from flows import open_launcher, open_store, shared_dir, shown
from flows.config import choices, compose, default, split
from flows.graph import Frontier, Graph, Node, unaccompanied
from flows.plan import table
from flows.pushgateway import pushing
from flows.reconcile import registered
from flows.step import Cancelled, Maker
from flows.tracking import Tracker
from stages.stage import CuveeError

GROUPS = ("recipe", "scale", "cluster")  # what the UI's form offers as lists to choose from
Recipe, Scale, Cluster = (Literal[choices(group)] for group in GROUPS)


@flow(name="cuvee", persist_result=False, task_runner=ThreadPoolTaskRunner(max_workers=256))
def cuvee(
    recipe: Recipe = default("recipe"), scale: Scale = default("scale"), cluster: Cluster = default("cluster"),
    overrides: list[str] = [], until: list[str] = [],  # noqa: B006 (the UI's form shows the defaults)
) -> None:  # fmt: skip
    """Run a recipe: finished artifacts are skipped, the rest is made.

    Args:
        recipe: What to make.
        scale: How large.
        cluster: Where.
        overrides: Hydra overrides, one an item, e.g. "data.sources=[~/docs]", "expert.math.sft.lr=1e-3". They win over
            the choices above.
        until: Names of stages to stop at (with all that they need); empty runs the whole recipe.
    """
    chosen, rest = split(overrides, GROUPS)
    chosen = {"recipe": recipe, "scale": scale, "cluster": cluster} | chosen
    graph = Graph(compose([*(f"{group}={choice}" for group, choice in chosen.items()), *rest]))
    flow_run = str(runtime.flow_run.id)
    with registered(flow_run):
        run_graph(graph, graph.until(until), flow_run, show=print if os.environ.get("CUVEE_TERMINAL") else None)


def run_graph(graph: Graph, nodes: list[Node], flow_run: str, show: Callable[[str], None] | None) -> None:
    """Make every node. Raises CuveeError naming the first stage that failed, after its siblings have ended."""
    conf = graph.conf
    logger = get_run_logger()
    launcher, store = open_launcher(conf), open_store(conf)
    shown.plan(list(table(store, graph, nodes)))  # which also refuses what can't run
    launcher.warm()
    tracker = pushing(Tracker(conf, flow_run, len(nodes)), conf.recipe.name, flow_run)
    cluster = conf.cluster
    maker = Maker(store, launcher, tracker, shared_dir(conf) / "work", cluster.cores, cluster.device, cluster.devices,
                  cluster.concurrent_stages)  # fmt: skip
    apart = unaccompanied(nodes)
    order = {node.name: at for at, node in enumerate(nodes)}
    progress = Progress(len(nodes), show or logger.info)
    frontier = Frontier(nodes)

    def make(name: str) -> None:
        node = graph.nodes[name]
        log = get_run_logger()
        # On one machine a stage beside which others may run gets its share of it; one that is alone gets all.
        alone = not launcher.REMOTE and (name in apart or (node.distributed and cluster.devices > 1))
        done_before = store.record(node.fingerprint) is not None

        def on_line(line: str) -> None:
            log.info(line)
            progress.line(name, line)

        if not done_before:
            progress.start(name)
        record = maker.make(node, alone, order[name], on_line)
        maker.expect([order[other] for other in frontier.after(name)])
        progress.done(name, record, skipped=done_before)

    futures, done = {}, False
    try:
        with _interruptible(maker):
            for node in nodes:
                run = task(make, name=node.name, task_run_name=node.name, cache_policy=NO_CACHE, retries=0)
                futures[node.name] = run.submit(node.name, wait_for=[futures[p.name] for p in node.parents])
            for future in futures.values():
                future.wait()
        states = [future.state for future in futures.values()]
        if not all(state.is_completed() for state in states):
            results = [state.result(raise_on_failure=False) for state in states if state.is_failed() or state.is_crashed()]
            raise _first([result for result in results if isinstance(result, Exception)])
        shown.result(store, nodes)
        done = True
    except BaseException:
        maker.cancel()
        raise
    finally:
        tracker.close(failed=not done)
        launcher.close()


def _first(errors: list[Exception]) -> Exception:
    """The error that explains the others: a cancellation or a missing input only follows from it."""
    never = CuveeError("the run did not complete; its stages were never started")
    return min(errors, key=lambda e: (isinstance(e, Cancelled), not isinstance(e, CuveeError)), default=never)


@contextmanager
def _interruptible(maker: Maker) -> Iterator[None]:
    """Ctrl-C ends the running stages first; a second one ends this process at once."""

    def handler(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        maker.cancel()

    if threading.current_thread() is not threading.main_thread():  # whoever owns that handles signals
        yield
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class Progress:
    """One line when a stage starts and ends, and its own progress now and then."""

    EVERY = 10.0  # seconds between two progress lines of one stage

    def __init__(self, total: int, show: Callable[[str], None]):
        self.total, self.show, self.finished = total, show, itertools.count(1)  # stages end in threads of their own
        self.last: dict[str, float] = {}

    def start(self, name: str) -> None:
        self.last[name] = time.monotonic()

    def line(self, name: str, line: str) -> None:
        due = line.startswith("step ") and time.monotonic() - self.last.get(name, 0) > self.EVERY
        if due or line.startswith("waiting: "):
            self.last[name] = time.monotonic()
            self.show(f"          {name:<24} {line}")

    def done(self, name: str, record: dict[str, Any], skipped: bool) -> None:
        at = next(self.finished)
        if skipped:
            return
        metrics = "  ".join(f"{k} {v:.4g}" for k, v in list(record["metrics"].items())[:4])
        self.show(f"[{at:>3}/{self.total}] {name:<24} {record['seconds']:6.1f} s   {metrics}")


def start(overrides: list[str], until: list[str]) -> None:
    """Run the flow in this process. Raises what the flow raised, KeyboardInterrupt after Ctrl-C."""
    from prefect.logging.handlers import APILogHandler

    try:
        chosen, rest = split(overrides, GROUPS)
        recipe, *place = (chosen.get(group, default(group)) for group in GROUPS)
        with tags("cuvee", recipe):  # as the deployments have
            cuvee.with_options(flow_run_name=" ".join([recipe, *place]))(**chosen, overrides=rest, until=until)
    except Cancelled:
        raise KeyboardInterrupt from None
    finally:
        APILogHandler().flush()  # before a private server ends
