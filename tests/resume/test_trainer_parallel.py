"""Tensor, sequence, pipeline and data parallel runs (gloo, processes as torchrun starts them) equal the single one."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from stages.stage import ConfigError
from tests.resume import trainer_run
from tests.resume.trainer_run import FORKS
from tests.unit.tiny import tokenizer

LAYOUTS = {
    "TP2": {"tensor_parallel": 2},
    "TP2+SP": {"tensor_parallel": 2, "sequence_parallel": True},
    "PP2": {"pipeline_parallel": 2},
    "PP2 VPP2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "DP2": {},
    "DP2 distributed": {"distributed_optimizer": True},
    "DP2 FSDP": {"fsdp": True},
}
PRODUCTS = {  # of four processes
    "TP2+SP x PP2": {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2},
    "TP2+SP x DP2 distributed": {"tensor_parallel": 2, "sequence_parallel": True, "distributed_optimizer": True},
    "TP2+SP x DP2 FSDP": {"tensor_parallel": 2, "sequence_parallel": True, "fsdp": True},
    "PP2 x DP2 FSDP": {"pipeline_parallel": 2, "fsdp": True},
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
        process.join(600)
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
    assert launch(1, root, words, steps=20, anchor=2.0) == [0]
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_a_single_process(name, tmp_path, words, single):
    from safetensors.torch import load_file

    assert launch(2, tmp_path, words, steps=20, anchor=2.0, **LAYOUTS[name]) == [0, 0]
    assert losses(tmp_path) == pytest.approx(losses(single), abs=1e-5)
    ours, theirs = (load_file(root / "out/model.safetensors") for root in (tmp_path, single))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < 1e-3


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_begin_as_a_single_process(name, tmp_path, words, single):
    assert launch(4, tmp_path, words, steps=20, anchor=2.0, save_every=0, die_at=8, **PRODUCTS[name]) == [-9] * 4
    assert losses(tmp_path) == pytest.approx(losses(single)[:8], abs=1e-5)


def test_eight_processes_share_in_every_way(tmp_path, words, single):
    """TP2 + SP x PP2 x DP2 with the distributed optimizer. No rank holds more of the model to save it than one row; each can
    have it all, as rollouts need."""
    from safetensors.torch import load_file

    layout = {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2, "distributed_optimizer": True}
    assert launch(8, tmp_path, words, steps=20, anchor=2.0, save_every=0, counted=True, **layout) == [0] * 8
    assert losses(tmp_path) == pytest.approx(losses(single), abs=1e-5)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    ours = {name: tensor for file in files for name, tensor in load_file(file).items()}
    theirs = load_file(single / "out/model.safetensors")
    assert len(files) > 4 and ours.keys() == theirs.keys()
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < 1e-3
    held, states = zip(*((tmp_path / f"out/held-{rank}").read_text().split() for rank in range(8)), strict=True)
    held = list(map(int, held))
    assert set(states) == {trainer_run.digest(ours)}
    row = max(tensor.nbytes for tensor in theirs.values())
    assert held[0] <= trainer_run.FILE_BYTES + 3 * row < sum(tensor.nbytes for tensor in theirs.values())
    assert 0 < max(held[1:]) <= row


@pytest.mark.parametrize("kind", ["pull", "regress"])
def test_references_and_reward_heads_equal_a_single_process(kind, tmp_path, words, single):
    options = {"steps": 6, "kind": kind, "init": single / "out", "lr": 3e-3}
    assert launch(1, tmp_path / "single", words, **options) == [0]
    for name in ("TP2+SP", "PP2"):
        assert launch(2, tmp_path / name, words, **options, **LAYOUTS[name]) == [0, 0]
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "single"), rel=1e-4), name


def test_a_step_with_fewer_groups_than_ranks(tmp_path, words):
    options = {"steps": 6, "groups": 1, "lr": 3e-3}
    assert launch(1, tmp_path / "single", words, **options) == [0]
    assert launch(2, tmp_path / "DP2", words, **options) == [0, 0]
    assert losses(tmp_path / "DP2") == pytest.approx(losses(tmp_path / "single"), abs=1e-5)


def test_a_reward_head_s_unused_embedding_is_reduced_under_fsdp(tmp_path, words, single):
    options = {"steps": 4, "kind": "regress", "init": single / "out", "lr": 3e-3}
    assert launch(1, tmp_path / "single", words, **options) == [0]
    assert launch(2, tmp_path / "PP2", words, **options, pipeline_parallel=2, fsdp=True) == [0, 0]
    assert losses(tmp_path / "PP2") == pytest.approx(losses(tmp_path / "single"), rel=1e-4)


SHARED, FSDP = {"distributed_optimizer": True}, {"fsdp": True}
CHAINS = {
    "plain": [(2, LAYOUTS["TP2"]), (1, {}), (2, LAYOUTS["PP2 VPP2"]), (2, LAYOUTS["TP2+SP"])],
    "distributed": [(2, SHARED), (1, SHARED), (4, SHARED | LAYOUTS["PP2 VPP2"]), (2, SHARED | LAYOUTS["TP2"])],
    "FSDP": [(2, FSDP), (1, FSDP)],
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_checkpoint_goes_on_in_another_layout(name, tmp_path, words, single):
    """Killed in one layout, resumed in another, and again: the losses of the uninterrupted single process."""
    *killed, (last, layout) = CHAINS[name]
    for i, (world, changed) in enumerate(killed):
        # killed 1, 2, 3 steps after the newest checkpoint, which is there however slow the disk
        options = {"steps": 20, "anchor": 2.0, "save_every": 4, "async_save": False, "die_at": 5 + 5 * i}
        assert launch(world, tmp_path, words, **options, **changed) == [-9] * world
    assert launch(last, tmp_path, words, steps=20, anchor=2.0, save_every=4, **layout) == [0] * last
    points = [json.loads(x) for x in (tmp_path / "scratch/metrics.jsonl").read_text().splitlines()]
    found = {point["step"]: point["loss"] for point in points}
    assert len(points) == 20 + sum(range(1, len(killed) + 1))
    assert [found[step] for step in range(1, 21)] == pytest.approx(losses(single), abs=1e-5)


def test_another_kind_of_optimizer_cannot_go_on(tmp_path):
    from stages.trainer.checkpoint import Checkpoints
    from stages.trainer.trainer import Trainer

    plain = Trainer(trainer_run.config(), trainer_run.SIZES, trainer_run.pull)
    plain.save_state(Checkpoints(tmp_path, background=False), 3, {})
    shared = Trainer(trainer_run.config(distributed_optimizer=True), trainer_run.SIZES, trainer_run.pull)
    with pytest.raises(ConfigError, match="saved with the plain optimizer .* set distributed_optimizer=false fsdp=false"):
        shared.load_state(tmp_path / "0000000003")
