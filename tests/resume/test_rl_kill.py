"""Kill reinforcement learning anywhere, start it again: the same model and the same rollouts as without the kill."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from stages.run import AGAIN
from stages.stage import Context, Kind, load, parse
from stages.store.mirror import Mirror
from tests.resume.test_another_host import KEYS, bucket  # noqa: F401 (a fixture)
from tests.resume.trainer_run import FORKS
from tests.unit.tiny import artifact, checkpoint, jsonl

VALUES = {
    "sequence_length": 128, "steps": 8, "batch_groups": 4, "completions": 3, "max_new_tokens": 6, "lr": 1e-3,
    "rollout_every": 2, "off_policy": True, "with_answer": True, "schedule": "constant", "log_every": 1, "save_every": 3,
    "options": {"beta": 0.05},
}  # fmt: skip


def main(root: Path, start: Path, prompts: Path, moment: str = "", number: int = 0, how: int = signal.SIGKILL, kept=None) -> None:
    """moment, number: the signal `how` when this is done for the number-th time (from 1). kept: arguments of a Mirror."""
    import torch

    from stages.rollout.engines.transformers import Engine
    from stages.train import _rollouts
    from stages.trainer import checkpoint as checkpoints

    torch.set_num_threads(1)
    os.environ.update(KEYS)
    places = {
        "sync": (Engine, "sync_weights"), "sample": (Engine, "generate"), "write": (_rollouts, "write_jsonl"),
        "read": (_rollouts, "read_jsonl"), "save": (checkpoints, "_commit"),
    }  # fmt: skip
    if moment:
        owner, name = places[moment]
        done, count = getattr(owner, name), iter(range(1, 1000))
        setattr(owner, name, lambda *a, **k: next(count) == number and os.kill(os.getpid(), how) or done(*a, **k))
    stage = load("train.rl")
    inputs = {"init": artifact(start, Kind.CHECKPOINT), "prompts": {"math": artifact(prompts, Kind.PROMPTS)}}
    stage.run(parse(stage.Config, VALUES, "rl"), inputs, root / "out", Context(root / "scratch", mirror=kept and Mirror(**kept)))


def run(root: Path, *arguments, seconds: float = 600) -> int:
    """The exit status; ended by SIGKILL after `seconds`."""
    for name in ("out", "scratch"):
        (root / name).mkdir(parents=True, exist_ok=True)
    process = FORKS.Process(target=main, args=(root, *arguments))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    rows = [{"id": f"n{i}", "domain": "math", "messages": [{"role": "user", "content": f"Pick {i}"}],
             "answer": str(i % 10), "check": {"number": 7}} for i in range(24)]  # fmt: skip
    for name in ("train", "heldout"):
        jsonl(root / f"prompts/{name}.jsonl", rows)
    checkpoint(root / "start")
    return root / "start", root / "prompts"


def outcome(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((root / "out").iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, inputs):
    root = tmp_path_factory.mktemp("whole")
    assert run(root, *inputs) == 0
    return root


def test_killed_at_named_and_at_random_moments(tmp_path, inputs, whole):
    root, rng = tmp_path / "killed", random.Random(0)
    moments = [("sync", 2), ("sample", 1), ("write", 1), ("save", 1), ("read", 2), ("save", 2)]
    for moment in moments:
        assert run(root, *inputs, *moment) == -signal.SIGKILL, moment
    run(root, *inputs, seconds=rng.uniform(1, 3))
    assert run(root, *inputs) == 0
    assert outcome(root) == outcome(whole)
    assert {"model.safetensors", "rollouts.jsonl", "samples.json"} <= set(outcome(root))


def test_another_host_goes_on_with_the_same_rollouts(tmp_path, inputs, whole, bucket):  # noqa: F811
    assert run(tmp_path / "first", *inputs, "read", 2, signal.SIGTERM, bucket) == AGAIN
    assert Mirror(**bucket).pull(tmp_path / "second/scratch").name == "0000000003"
    assert run(tmp_path / "second", *inputs) == 0
    assert outcome(tmp_path / "second") == outcome(whole)
