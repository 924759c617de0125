"""Kill a training run anywhere, start it again: the same bytes as without the kill. Processes are forked from one
that has imported torch and Megatron-core, as stages are."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from stages.run import AGAIN
from tests.resume import trainer_run
from tests.resume.test_trainer_parallel import launch
from tests.resume.trainer_run import FORKS
from tests.unit.tiny import tokenizer


def start(root: Path, words: Path, **options) -> BaseProcess:
    process = FORKS.Process(target=trainer_run.run, args=(root, words), kwargs=options)
    process.start()
    return process


def finish(root: Path, words: Path, **options) -> int:
    process = start(root, words, **options)
    process.join(600)
    return process.exitcode


def outcome(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((root / "out").iterdir())}


def series(root: Path) -> dict[int, float]:
    """Loss by step; where a step was repeated, both times must have given the same."""
    found: dict[int, set[float]] = {}
    for line in (root / "scratch/metrics.jsonl").read_text().splitlines():
        point = json.loads(line)
        found.setdefault(point["step"], set()).add(point["loss"])
    assert all(len(losses) == 1 for losses in found.values())
    return {step: losses.pop() for step, losses in sorted(found.items())}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, words):
    root = tmp_path_factory.mktemp("whole")
    assert finish(root, words) == 0
    return root


def test_killed_at_named_moments(tmp_path, words, whole):
    kills = [
        {"die_at": 2}, {"die_at": 4}, {"die_in": "save"}, {"die_in": "removal", "die_at": 11}, {"die_at": 10},
        {"die_in": "publish"},
    ]  # fmt: skip
    for kill in kills:
        assert finish(tmp_path, words, **kill) == -signal.SIGKILL, kill
    assert finish(tmp_path, words) == 0
    assert outcome(tmp_path) == outcome(whole)
    assert series(tmp_path) == series(whole) and len(series(whole)) == 12


def test_killed_at_random_moments(tmp_path, words, whole):
    rng, kills = random.Random(0), 0
    for _ in range(12):
        process = start(tmp_path, words)
        process.join(rng.uniform(0.1, 0.6))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0:
            break
    else:
        assert finish(tmp_path, words) == 0
    assert kills and outcome(tmp_path) == outcome(whole) and series(tmp_path) == series(whole)


def test_killed_at_every_file_of_a_save_again_and_again(tmp_path, words):
    """Before each file of a checkpoint is made, written, read, renamed or removed."""
    options = {"save_every": 4, "steps": 9, "async_save": True}
    assert finish(tmp_path / "whole", words, **options) == 0
    assert finish(tmp_path / "begun", words, **options | {"async_save": False}, die_at=8) == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "begun/scratch/checkpoints").iterdir()) == ["0000000004", "0000000008"]
    for file in range(1, 100, 3):
        root = tmp_path / str(file)
        shutil.copytree(tmp_path / "begun", root)
        ends = [finish(root, words, **options, file=file + more) for more in range(3)]
        if ends[0] == 0:
            break
        assert ends[-1] == 0 or finish(root, words, **options) == 0
        assert outcome(root) == outcome(tmp_path / "whole") and series(root) == series(tmp_path / "whole"), file
    assert 25 < file < 99


def test_a_checkpoint_is_the_step_it_was_saved_at_though_training_went_on(tmp_path, words, whole):
    assert finish(tmp_path, words, slow=2, die_at=7) == -signal.SIGKILL
    steps = sorted(series(tmp_path))
    kept = [p.parent.name for p in (tmp_path / "scratch/checkpoints").glob("*/commit.json")]
    assert steps == [1, 2, 3, 4, 5, 6, 7] and kept == ["0000000003"]
    assert finish(tmp_path, words) == 0
    assert outcome(tmp_path) == outcome(whole) and series(tmp_path) == series(whole)


def test_two_ranks_go_on_bit_for_bit(tmp_path, words):
    """Killed while both write, then stopped by a SIGTERM that one of them got."""
    options, killed = {"steps": 8, "distributed_optimizer": True}, tmp_path / "killed"
    assert launch(2, tmp_path / "whole", words, **options) == [0, 0]
    assert launch(2, killed, words, **options, slow=2, die_at=7) == [-signal.SIGKILL] * 2
    assert [p.parent.name for p in killed.glob("scratch/checkpoints/*/commit.json")] == ["0000000003"]
    first, second = (path.stat().st_size for path in sorted(killed.glob("scratch/checkpoints/0000000003/*.distcp")))
    assert first < 2 * second  # the weights are the first one's to write, the optimizer's state is shared
    assert launch(2, killed, words, **options, stop_at=3) == [AGAIN] * 2
    assert launch(2, killed, words, **options) == [0, 0]
    assert outcome(killed) == outcome(tmp_path / "whole") and series(killed) == series(tmp_path / "whole")
    lines = (killed / "scratch/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 8), 4, *range(5, 9)]


def test_two_ranks_find_a_damaged_checkpoint(tmp_path, words):
    options, killed = {"steps": 7, "tensor_parallel": 2, "save_every": 2}, tmp_path / "killed"
    assert launch(2, tmp_path / "whole", words, **options) == [0, 0]
    assert launch(2, killed, words, **options, async_save=False, die_at=5) == [-signal.SIGKILL] * 2
    shard = killed / "scratch/checkpoints/0000000004/__1_0.distcp"  # the second rank's
    shard.write_bytes(shard.read_bytes()[:-1])
    assert launch(2, killed, words, **options) == [0, 0]
    assert outcome(killed) == outcome(tmp_path / "whole")
    lines = (killed / "scratch/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 6), *range(3, 8)]


def test_sigterm_saves_and_asks_to_be_started_again(tmp_path, words, whole):
    log = tmp_path / "scratch/metrics.jsonl"
    assert finish(tmp_path, words, save_every=0, stop_at=3) == AGAIN
    assert len(list((tmp_path / "scratch/checkpoints").glob("*/commit.json"))) == 1
    assert log.read_text().count("\n") == 4
    assert finish(tmp_path, words) == 0
    assert outcome(tmp_path) == outcome(whole)
    assert log.read_text().count("\n") == 12  # no step was repeated


def test_a_finished_run_is_published_without_training(tmp_path, words, whole):
    assert finish(tmp_path, words, out="elsewhere") == 0
    (tmp_path / "scratch/metrics.jsonl").unlink()
    assert finish(tmp_path, words) == 0
    assert outcome(tmp_path) == outcome(whole) and not (tmp_path / "scratch/metrics.jsonl").exists()


def test_two_checkpoints_are_kept(whole):
    assert [p.name for p in sorted((whole / "scratch/checkpoints").iterdir())] == ["0000000009", "0000000012"]
