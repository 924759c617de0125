"""Tensor, sequence, pipeline and data parallel runs (gloo, processes as torchrun starts them) equal the single one."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest

from stages.stage import ConfigError
from tests.resume import trainer_run
from tests.unit.tiny import tokenizer

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*trainer_run.PRELOAD, "tests.resume.trainer_run"])
LAYOUTS = {
    "TP2": {"tensor_parallel": 2},
    "TP2+SP": {"tensor_parallel": 2, "sequence_parallel": True},
    "PP2": {"pipeline_parallel": 2},
    "PP2 VPP2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "DP2": {},
    "DP2 distributed": {"distributed_optimizer": True},
    "DP2 FSDP": {"fsdp": True},
    "TP2+SP PP2": {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2},
}


def rank_main(rank: int, world: int, port: int, *args, **options) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    trainer_run.run(*args, **options)


def port() -> int:
    """A free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(world: int, root: Path, words: Path, **options) -> list[int]:
    free = port()
    ranks = [FORKS.Process(target=rank_main, args=(r, world, free, root, words), kwargs=options) for r in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks]


def losses(root: Path) -> list[float]:
    points = [json.loads(line) for line in (root / "scratch/metrics.jsonl").read_text().splitlines()]
    return [point["loss"] for point in points if "loss" in point]


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

    world = 4 if name == "TP2+SP PP2" else 2
    assert launch(world, tmp_path, words, steps=20, **LAYOUTS[name]) == [0] * world
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


@pytest.mark.parametrize("before, after", [
    ((2, {"tensor_parallel": 2}), (1, {})),
    ((1, {}), (2, {"tensor_parallel": 2, "sequence_parallel": True})),
    ((2, {"pipeline_parallel": 2, "virtual_pipeline": 2}), (2, {"tensor_parallel": 2})),
    ((2, {"distributed_optimizer": True}), (1, {"distributed_optimizer": True})),
    ((1, {"distributed_optimizer": True}), (2, {"distributed_optimizer": True, "tensor_parallel": 2})),
    ((2, {"fsdp": True}), (1, {"fsdp": True})),
], ids=["TP2-single", "single-TP2+SP", "PP2 VPP2-TP2", "distributed DP2-DP1", "distributed DP1-TP2", "FSDP DP2-DP1"])  # fmt: skip
def test_a_checkpoint_goes_on_in_another_layout(before, after, tmp_path, words, single):
    """Killed in one layout, resumed in another: the losses of the uninterrupted single process."""
    (world, layout), (other, changed) = before, after
    assert launch(world, tmp_path, words, steps=20, save_every=8, die_at=10, **layout) == [-9] * world
    assert launch(other, tmp_path, words, steps=20, save_every=8, **changed) == [0] * other
    points = [json.loads(x) for x in (tmp_path / "scratch/metrics.jsonl").read_text().splitlines()]
    found = {point["step"]: point["loss"] for point in points}
    assert [point["step"] for point in points].count(9) == 2  # the checkpoint of step 8 was the newest
    assert [found[step] for step in range(1, 21)] == pytest.approx(losses(single), abs=1e-5)


def test_another_kind_of_optimizer_cannot_go_on(tmp_path):
    from stages.trainer.checkpoint import Checkpoints
    from stages.trainer.trainer import Trainer

    plain = Trainer(trainer_run.config(), trainer_run.SIZES, trainer_run.pull)
    plain.save_state(Checkpoints(tmp_path, background=False), 3, {})
    shared = Trainer(trainer_run.config(distributed_optimizer=True), trainer_run.SIZES, trainer_run.pull)
    with pytest.raises(ConfigError, match="saved with the plain optimizer .* set distributed_optimizer=false fsdp=false"):
        shared.load_state(tmp_path / "0000000003")
