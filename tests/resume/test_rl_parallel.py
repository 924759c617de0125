"""Reinforcement learning in two data-parallel processes: each samples its part, and all is as with a single one."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from stages.stage import Context, Kind, load, parse
from tests.resume.test_trainer_parallel import FORKS, losses, port
from tests.unit.tiny import artifact, checkpoint, hosting, jsonl

VALUES = {
    "sequence_length": 128, "steps": 3, "batch_groups": 6, "completions": 3, "max_new_tokens": 6, "lr": 1e-3,
    "rollout_every": 2, "with_answer": True, "schedule": "constant", "log_every": 1, "options": {"beta": 0.05},
}  # fmt: skip


def rank_main(rank: int, world: int, port: int, root: Path, start: Path, prompts: Path, changes: dict) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    from stages.rollout._collect import Sampler

    call, asked = Sampler.__call__, []
    Sampler.__call__ = lambda self, prompts, *more: asked.append(len(prompts)) or call(self, prompts, *more)
    stage = load("train.rl")
    inputs = {"init": artifact(start, Kind.CHECKPOINT), "prompts": {"math": artifact(prompts, Kind.PROMPTS)}}
    try:
        metrics = stage.run(parse(stage.Config, VALUES | changes, "rl"), inputs, root / "out", Context(root / "scratch"))
        (root / "out/metrics.json").write_text(json.dumps(metrics))
    finally:
        (root / f"asked-{rank}.json").write_text(json.dumps(asked))


def launch(world: int, root: Path, *paths: Path, **changes) -> Path:
    for name in ("out", "scratch"):
        (root / name).mkdir(parents=True)
    free = port()
    ranks = [FORKS.Process(target=rank_main, args=(r, world, free, root, *paths, changes)) for r in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
    assert [process.exitcode for process in ranks] == [0] * world
    return root


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("inputs")
    start = tmp_path / "start"
    checkpoint(start)
    rows = [{"id": f"n{i}", "domain": "math", "messages": [{"role": "user", "content": f"Pick {i}"}],
             "answer": str(i % 10), "check": {"number": 7}} for i in range(24)]  # fmt: skip
    jsonl(tmp_path / "prompts/train.jsonl", rows)
    jsonl(tmp_path / "prompts/heldout.jsonl", rows[:4])
    return start, tmp_path / "prompts"


def test_two_processes_equal_one(tmp_path, inputs):
    one, two = (launch(n, tmp_path / str(n), *inputs) for n in (1, 2))
    assert losses(two) == pytest.approx(losses(one), abs=1e-5) and len(losses(one)) == 3
    sampled = [[json.loads(line) for line in (r / "out/rollouts.jsonl").read_text().splitlines()] for r in (one, two)]
    assert [row["tokens"] for row in sampled[0]] == [row["tokens"] for row in sampled[1]]
    asked = [json.loads((two / f"asked-{rank}.json").read_text()) for rank in range(2)]
    assert asked == [[6, 3], [6, 3]] or asked == [[6, 6], [6, 6]]
    found, expected = (json.loads((r / "out/metrics.json").read_text()) for r in (two, one))
    assert found["reward_last"] == pytest.approx(expected["reward_last"])


def test_one_process_asks_a_server_for_both(tmp_path, inputs):
    from flows.serve import app

    with hosting(app(inputs[0], "tiny", rollouts=True)) as address:
        options = {"url": f"{address}/v1", "tolerance": 1e-3}
        root = launch(2, tmp_path / "2", *inputs, engine="openai", engine_options=options)
    asked = [json.loads((root / f"asked-{rank}.json").read_text()) for rank in range(2)]
    assert asked == [[12, 12], []] and len(losses(root)) == 3
    rows = [json.loads(line) for line in (root / "out/rollouts.jsonl").read_text().splitlines()]
    assert [row["version"] for row in rows] == [0] * 12 + [2] * 12


def fail_on(rank: int, port: int, failing: int, out: Path) -> None:
    from torch.distributed import init_process_group

    from stages.trainer.parallel import gathered, on_first

    init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def make() -> int:
        if rank == failing:
            raise OSError(errno.ENOSPC, "full")
        return rank

    found = []
    for collective in (gathered, on_first):
        try:
            found.append(collective(make))
        except Exception as error:
            found.append(repr(error))
    (out / f"{failing}-{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("failing, wanted", [(0, 2), (1, 1)])
def test_what_fails_on_one_rank_fails_on_all_and_as_itself_on_its_own(tmp_path, failing, wanted):
    """A full disk must reach the user as one (stages/run.py): an OSError that is only told of is none any more."""
    free = port()
    ranks = [FORKS.Process(target=fail_on, args=(rank, free, failing, tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    own, other = (json.loads((tmp_path / f"{failing}-{r}.json").read_text()) for r in (failing, 1 - failing))
    error = "OSError(28, 'full')"
    assert own[:wanted] == [error] * wanted
    assert other[:wanted] == [f'RuntimeError("on rank {failing}: {error}")'] * wanted
    assert own[wanted:] == other[wanted:] == [0] * (2 - wanted)
