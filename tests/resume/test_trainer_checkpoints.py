"""Checkpoints that are damaged, of other data or models, milestones, writers that fail; all in one process."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace

import pytest

from stages.objectives import ce
from stages.stage import Context, CuveeError
from stages.trainer import checkpoint
from stages.trainer.config import TrainConfig
from stages.trainer.loop import train
from tests.resume.trainer_run import SIZES, Counting, config
from tests.unit.tiny import tokenizer


class Stop(Exception):
    pass


class Stopping(Counting):
    """Raises Stop when the batch of step `at` is asked for."""

    fingerprint = "this data"

    def __init__(self, at: int = -1):
        super().__init__()
        self.at = at

    def batch(self, step, trainer):
        if step == self.at:
            raise Stop
        return super().batch(step, trainer)


class Told(Context):
    """A context that remembers its log."""

    def log(self, message: str) -> None:
        self.lines = [*getattr(self, "lines", []), message]


def run(root, words, at=-1, stream=None, model=SIZES, made=config, **changes):
    """(weights, log lines) of a run in `root` that stops at step `at`."""
    ctx = Told(root / "scratch")
    for folder in ("out", "scratch"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    try:
        train(config=made(**changes), stream=stream or Stopping(at), objective=lambda b: ce.loss(b, ce.Config()),
              out=root / "out", ctx=ctx, tokenizer=words, model=model)  # fmt: skip
    except Stop:
        return b"", ctx.lines
    return (root / "out/model.safetensors").read_bytes(), ctx.lines


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, words):
    """A run stopped after step 7, with checkpoints of steps 3 and 6; and the weights it should come to."""
    root = tmp_path_factory.mktemp("stopped")
    whole, _ = run(tmp_path_factory.mktemp("whole"), words)
    run(root, words, at=7, async_save=False)
    assert names(root) == ["0000000003", "0000000006"]
    return root, whole


def names(root) -> list[str]:
    return [path.name for path in checkpoint.committed(root / "scratch/checkpoints")]


def shard(path):
    return next(path.glob("*.distcp"))


DAMAGE = {
    "truncated": (lambda path: shard(path).write_bytes(shard(path).read_bytes()[:-100]), "bytes of"),
    "changed": (lambda path: flip(shard(path)), "other contents"),
    "missing": (lambda path: shard(path).unlink(), "__0_0.distcp is missing"),
    "metadata": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "mark": (lambda path: (path / "commit.json").write_text('{"progress": {"st'), "commit.json is not readable"),
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(name, tmp_path, words, stopped):
    root, whole = tmp_path / "run", stopped[1]
    shutil.copytree(stopped[0], root)
    damage, message = DAMAGE[name]
    damage(root / "scratch/checkpoints/0000000006")
    found, log = run(root, words)
    assert any("0000000006" in line and message in line and "going on from 0000000003" in line for line in log)
    assert "resumed after step 3/12" in log and found == whole
    assert names(root) == ["0000000009", "0000000012"]


class Phases(TrainConfig):
    """Smaller microbatches after step 5."""

    def placed(self, step):
        return replace(self, micro_batch_tokens=256 if step < 5 else 64)


def test_every_step_is_trained_as_its_phase_is_placed(tmp_path, words):
    """Also those after a checkpoint of the phase before, where the newest, of another phase, is damaged."""
    trained = []

    class Noting(Stopping):
        def batch(self, step, trainer):
            trained.append((step, trainer.config.micro_batch_tokens))
            return super().batch(step, trainer)

    def start():
        trained.clear()
        run(tmp_path, words, stream=Noting(), made=lambda: Phases(**vars(config(async_save=False))))

    with pytest.raises(SystemExit):
        start()
    assert trained == [(step, 256) for step in range(5)] and names(tmp_path) == ["0000000003", "0000000005"]
    flip(shard(tmp_path / "scratch/checkpoints/0000000005"))
    with pytest.raises(SystemExit):
        start()
    assert trained == [(3, 256), (4, 256)]
    start()
    assert trained == [(step, 64) for step in range(5, 12)]


def test_only_damaged_checkpoints_are_one_sentence(tmp_path, words, stopped):
    root = tmp_path / "run"
    shutil.copytree(stopped[0], root)
    for step in (3, 6):
        shard(root / f"scratch/checkpoints/{step:010d}").unlink()
    before = sorted(root.rglob("*"))
    with pytest.raises(CuveeError, match="none of its 2 checkpoints is whole .*; remove the folder to start"):
        run(root, words)
    assert sorted(root.rglob("*")) == before


def test_another_model_or_other_data_is_refused(tmp_path, words, stopped):
    root = tmp_path / "run"
    shutil.copytree(stopped[0], root)
    stream = Stopping()
    stream.fingerprint = "that data"
    with pytest.raises(
        CuveeError, match="made with data this data instead of that data; go back to that configuration"
    ):
        run(root, words, stream=stream)
    with pytest.raises(CuveeError, match="made with ffn_hidden_size 48 instead of 64, num_layers 4 instead of 2;"):
        run(root, words, model=replace(SIZES, num_layers=2, ffn_hidden_size=64))


def test_milestones_stay(tmp_path, words):
    run(tmp_path, words, keep_every=4)
    assert names(tmp_path) == ["0000000004", "0000000008", "0000000009", "0000000012"]


def test_a_full_disk_under_the_writer_is_an_oserror(tmp_path, words, monkeypatch):
    def full(paths):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(checkpoint, "_described", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, words)
    assert names(tmp_path) == []


def test_the_mark_tells_every_file(stopped):
    path = stopped[0] / "scratch/checkpoints/0000000006"
    mark = json.loads((path / "commit.json").read_text())
    assert mark["files"].keys() == {p.name for p in path.iterdir()} - {"commit.json"} and len(mark["files"]) == 4
    assert mark["progress"]["step"] == 6 and mark["data"] == "this data"
