"""The command `cuvee`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from stages.stage import CuveeError

OVERRIDES = "Hydra overrides, e.g. data.sources=[~/docs] expert.math.sft.lr=1e-3 recipe.experts=[code,math]"


def main() -> None:
    """Entry point: every user's mistake ends as one sentence and a non-zero status."""
    args = _parse(sys.argv[1:])
    try:
        sys.exit(args.command(args))
    except CuveeError as error:
        print(f"cuvee: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ncuvee: interrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


def _parse(words: list[str]) -> argparse.Namespace:
    """Options and overrides may stand in any order, which a parser with commands does not take by itself."""
    parser, commands = _parser()
    if words and words[0] in commands:
        return commands[words[0]].parse_intermixed_args(words[1:])
    return parser.parse_args(words)


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser("cuvee", description="Raw text to a blended, polished, servable language model.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, function: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=function)
        return sub

    for name, function, help in (("run", run, "run the recipe: finished artifacts are skipped, the rest is made"),
                                 ("plan", plan, "the same graph without running: what is done, what will run and why")):
        sub = command(name, function, help)
        sub.add_argument("overrides", nargs="*", help=OVERRIDES)
        sub.add_argument("--until", default="", help="stop at these stages (comma separated), e.g. sft-soup")
    sub = command("submit", submit, "the same run on a Kubernetes cluster; Ctrl-C leaves it, the same command finds it again")
    sub.add_argument("overrides", nargs="*", help=f"cluster=kubernetes and {OVERRIDES}")
    sub.add_argument("--until", default="", help="stop at these stages (comma separated), e.g. sft-soup")
    sub.add_argument("--detach", action="store_true", help="don't follow the run's log")
    sub.add_argument("--cancel", action="store_true", help="end the run, and return when none of its pods is left")
    subs = {
        "why": command("why", why, "what made an artifact: the tree of its inputs"),
        "diff": command("diff", diff, "which fields made two artifacts differ"),
        "verify": command("verify", verify, "re-hash an artifact and all its ancestors"),
        "chat": command("chat", chat, "talk to a model in the terminal"),
        "serve": command("serve", serve, "an OpenAI-compatible endpoint on loopback"),
        "preview": command("preview", preview, "what SFT would learn of a file of conversations: [[trained]] text, refused lines"),
    }
    for name, sub in subs.items():
        sub.add_argument("artifact", help="an alias (polished, sft-soup, ...) or the beginning of an address")
        if name == "diff":
            sub.add_argument("other", help="the artifact to compare with")
        if name == "preview":
            sub.add_argument("file", help="a JSONL or Parquet file of conversations, or a folder of them")
        sub.add_argument("overrides", nargs="*", help="overrides that choose the store, e.g. store=s3 store.uri=s3://b/p")
    sub = subs["chat"]
    sub.add_argument("--system", default="", help="a system message (preamble)")
    sub.add_argument("--temperature", type=float, default=0.0)
    subs["serve"].add_argument("--port", type=int, default=8000)
    subs["serve"].add_argument("--rollouts", action="store_true", help="also be an engine for RL, which sets its weights")
    subs["preview"].add_argument("--count", type=int, default=3, help="lines shown")
    subs["preview"].add_argument("--turns", choices=("all", "last"), default="all", help="assistant turns that are learned")
    sub = command("up", up, "Prefect server, worker and MLflow on this machine; deployments registered")
    sub.add_argument("--prefect-port", type=int, default=4200)
    sub.add_argument("--mlflow-port", type=int, default=5000)
    sub = command("clean", clean, "remove from the store what was never published; published artifacts are never touched")
    sub.add_argument("overrides", nargs="*", help="overrides that choose the store, e.g. store=s3 store.uri=s3://b/p")
    sub.add_argument("--days", type=float, default=7.0, help="how old it must be")
    sub = command("worker", worker, "register the deployments with the server at PREFECT_API_URL and run what they start")
    sub.add_argument("overrides", nargs="*", help="defaults of the deployments, e.g. cluster=kubernetes store=s3 store.uri=s3://b/p")
    return parser, commands.choices


def _graph(args: argparse.Namespace) -> tuple[Any, list[Any], Any]:
    from flows import open_store
    from flows.config import compose
    from flows.graph import Graph
    from flows.submit import targets

    graph = Graph(compose(args.overrides))
    return graph, graph.until(targets(args.until)), open_store(graph.conf)


def run(args: argparse.Namespace) -> None:
    from flows import together
    from flows.summary import closing

    started = time.monotonic()
    graph, nodes, store = _graph(args)
    missing = [record for record in together(store.record, [n.fingerprint for n in nodes]) if record is None]
    if missing:
        print(f"cuvee: {len(missing)} of {len(nodes)} stages to make, {len(nodes) - len(missing)} are made already")
        _run_flow(args, graph, nodes)
    else:
        together(lambda node: store.set_alias(node.name, node.fingerprint), nodes)
        print(f"cuvee: all {len(nodes)} stages are made already; nothing to do")
        _tell_mlflow()
    print(*closing(store, graph, nodes, time.monotonic() - started), sep="\n")


def _tell_mlflow() -> None:
    """What earlier runs could not tell it, if there is anything."""
    from flows.config import state_dir

    if any((state_dir() / "tracking").glob("*.jsonl")):
        from flows.tracking import try_left

        try_left()


def _run_flow(args: argparse.Namespace, graph: Any, nodes: list[Any]) -> None:
    from flows.services import prefect_api

    with prefect_api():
        # The progress lines are enough for a terminal; Prefect's own log lines go to its API, where its UI shows them.
        os.environ.update(CUVEE_TERMINAL="1", PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="CRITICAL")
        from flows.flow import start

        start(args.overrides, [n.name for n in nodes] if args.until else [])


def plan(args: argparse.Namespace) -> None:
    from itertools import chain

    from flows.plan import dry_run, table

    graph, nodes, store = _graph(args)
    for line in chain(list(table(store, graph, nodes)), dry_run(graph, nodes)):
        print(line)


def submit(args: argparse.Namespace) -> int:
    from flows.submit import submit

    return submit(args.overrides, args.until, follow=not args.detach, cancel=args.cancel)


def _store(args: argparse.Namespace) -> Any:
    from flows import open_store
    from flows.config import compose

    return open_store(compose(args.overrides))


def why(args: argparse.Namespace) -> None:
    from flows.lineage import find, why

    store = _store(args)
    print(*why(store, find(store, args.artifact)), sep="\n")


def diff(args: argparse.Namespace) -> None:
    from flows.lineage import diff, find

    store = _store(args)
    print(*diff(store, find(store, args.artifact), find(store, args.other)), sep="\n")


def verify(args: argparse.Namespace) -> int:
    from flows.lineage import AGAIN, find, verify
    from flows.step import ancestors

    store = _store(args)
    record = find(store, args.artifact)
    lines = list(verify(store, record))
    defects = [line for line in lines if not line.endswith(AGAIN)]
    for line in lines:
        print(line)
    made = ancestors(store, [record])
    files = sum(len(r["files"]) for r in made.values())
    print(f"{record['name']} {record['fingerprint'][:12]}: {len(made)} artifacts, {files} files, "
          + (f"{len(defects)} defect{'s' * (len(defects) > 1)}; delete the damaged artifacts' folders under {store.uri} and "
             "run again to remake them" if defects else "all intact"))
    return 1 if defects else 0


def _model_folder(args: argparse.Namespace) -> Any:
    from flows.lineage import find

    store = _store(args)
    record = find(store, args.artifact)
    if record["kind"] not in ("checkpoint", "export"):
        models = [n for n, fp in store.aliases().items()
                  if (store.record(fp) or {}).get("kind") in ("checkpoint", "export")]
        raise CuveeError(f"{args.artifact!r} is a {record['kind']}, not a model; models: {', '.join(models)}")
    return store.fetch(record["fingerprint"])


def chat(args: argparse.Namespace) -> None:
    if not 0 <= args.temperature <= 2:
        raise CuveeError(f"--temperature {args.temperature:g}: give 0 (the likeliest token each time) to 2")
    folder = _model_folder(args)
    from flows.chat import chat

    chat(folder, system=args.system, temperature=args.temperature)


def serve(args: argparse.Namespace) -> None:
    folder = _model_folder(args)
    from flows.serve import serve

    serve(folder, name=args.artifact, port=args.port, rollouts=args.rollouts)


def preview(args: argparse.Namespace) -> None:
    from itertools import islice

    from flows.lineage import find

    if args.count < 1:
        raise CuveeError(f"--count {args.count}: give at least 1")
    store = _store(args)
    record = find(store, args.artifact)
    folder = store.fetch(record["fingerprint"])
    if not (folder / "tokenizer.json").exists():
        raise CuveeError(f"{args.artifact!r} is a {record['kind']} without a tokenizer; name the tokenizer or a model")
    from transformers import AutoTokenizer

    from stages.data.conversations import previews

    for text in islice(previews(AutoTokenizer.from_pretrained(folder), [args.file], args.turns), args.count):
        print(text)


def up(args: argparse.Namespace) -> None:
    from flows.up import up

    up(args.prefect_port, args.mlflow_port)


def clean(args: argparse.Namespace) -> None:
    from flows import open_store, shared_dir
    from flows.config import compose
    from stages.store.retention import clean

    if args.days < 1:
        raise CuveeError(f"--days {args.days:g}: what is younger than a day may be on its way; give at least 1")
    conf = compose(args.overrides)
    removed = [print(line) for line in clean(open_store(conf), args.days, shared_dir(conf) / "work")]
    print(f"cuvee: {len(removed)} things removed")


def worker(args: argparse.Namespace) -> None:
    from flows.up import worker

    worker(args.overrides)


if __name__ == "__main__":
    main()
