"""Tensor, sequence, pipeline and data parallel runs (gloo, processes as torchrun starts them) equal the single one."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest

from tests.resume import trainer_run
from tests.unit.tiny import tokenizer

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*trainer_run.PRELOAD, "tests.resume.trainer_run"])
LAYOUTS = {
    "TP2": {"tensor_parallel": 2},
    "TP2+SP": {"tensor_parallel": 2, "sequence_parallel": True},
    "PP2": {"pipeline_parallel": 2},
    "DP2": {},
}


def rank_main(rank: int, world: int, port: int, *args, **options) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    trainer_run.run(*args, **options)


def launch(world: int, root: Path, words: Path, **options) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [FORKS.Process(target=rank_main, args=(r, world, port, root, words), kwargs=options) for r in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks]


def losses(root: Path) -> list[float]:
    points = [json.loads(line) for line in (root / "scratch/metrics.jsonl").read_text().splitlines()]
    return [point["loss"] for point in points]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


@pytest.fixture(scope="module")
def single(tmp_path_factory, words):
    root = tmp_path_factory.mktemp("single")
    assert launch(1, root, words, steps=20) == [0]
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_a_single_process(name, tmp_path, words, single):
    from safetensors.torch import load_file

    assert launch(2, tmp_path, words, steps=20, **LAYOUTS[name]) == [0, 0]
    assert losses(tmp_path) == pytest.approx(losses(single), abs=1e-5)
    ours, theirs = (load_file(root / "out/model.safetensors") for root in (tmp_path, single))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < 1e-3


@pytest.mark.parametrize("kind", ["pull", "regress"])
def test_references_and_reward_heads_equal_a_single_process(kind, tmp_path, words, single):
    options = {"steps": 6, "kind": kind, "init": single / "out", "lr": 3e-3}
    assert launch(1, tmp_path / "single", words, **options) == [0]
    for name in ("TP2+SP", "PP2"):
        assert launch(2, tmp_path / name, words, **options, **LAYOUTS[name]) == [0, 0]
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "single"), rel=1e-4), name


def test_a_checkpoint_goes_on_in_another_layout(tmp_path, words, single):
    """Saved by two tensor-parallel ranks, resumed by one process."""
    codes = launch(2, tmp_path, words, steps=20, save_every=8, die_at=10, tensor_parallel=2)
    assert codes == [-9, -9]
    assert launch(1, tmp_path, words, steps=20, save_every=8) == [0]
    found = dict(zip([json.loads(x)["step"] for x in (tmp_path / "scratch/metrics.jsonl").read_text().splitlines()],
                     losses(tmp_path), strict=True))  # fmt: skip
    assert [found[step] for step in range(1, 21)] == pytest.approx(losses(single), abs=1e-5)
