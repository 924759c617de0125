"""What objectives bring along (a teacher's tokens, the sampler's log-probabilities, a batch's baseline) under data and
pipeline parallelism: two processes take the steps of one. Context parallelism by its shares."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.model.folder import read_config
from stages.stage import Context, resolve
from stages.train._critic import Critic, Criticised
from stages.train._groups import make_sequence, needs_values, prepared
from stages.trainer.batch import Group, Sequence
from stages.trainer.config import TrainConfig
from stages.trainer.microbatch import Sharing, build
from tests.resume.test_trainer_parallel import port
from tests.resume.trainer_run import FORKS

OBJECTIVES = ("grpo", "kto", "distill", "ppo")


def groups(teacher: bool) -> list[Group]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(6):
        prompt = rng.integers(20, 270, rng.integers(2, 9)).tolist()
        made = []
        for _ in range(1 if teacher else 3):
            completion = rng.integers(20, 270, rng.integers(1, 9)).tolist()
            nats = (-5 - rng.random(len(completion))).tolist()
            made.append(make_sequence(prompt, completion, nats, reward=float(rng.normal())))
        found.append([taught(s, rng) for s in made] if teacher else made)
    return found


def taught(s: Sequence, rng: np.random.Generator) -> Sequence:
    shape = (len(s.tokens), 2)
    teacher = (rng.integers(20, 270, shape).astype(np.int32), -rng.random(shape).astype(np.float32))
    return Sequence(s.tokens, s.mask, s.fields, teacher=teacher)


class Fixed:
    """The same groups in every step, each step a block of its own."""

    def __init__(self, batch: list[Group]):
        self.batch_of_all, self.groups = batch, [batch]

    def batch(self, step, trainer):
        self.current = step
        return self.batch_of_all


def steps(model: Path, scratch: Path, **layout) -> dict[str, list[dict[str, float]]]:
    """Metrics of three steps with each objective."""
    from stages.trainer.trainer import Trainer

    torch.set_num_threads(1)
    found = {}
    for name in OBJECTIVES:
        module = resolve("objectives", name)
        trainer = Trainer(
            TrainConfig(steps=3, micro_batch_tokens=64, **layout), read_config(model),
            lambda packed, module=module: module.loss(packed, module.Config()), model,
            reference=model if module.NEEDS_REFERENCE else None,
        )  # fmt: skip
        stream = prepared(module, Fixed(groups(name == "distill")))
        if needs_values(module):
            critic = Critic(model, module, module.Config())
            trainer.critic = Trainer(trainer.config, read_config(model), critic.objective, model, "value")
            stream = Criticised(stream, critic, trainer.config, Context(scratch))
        found[name] = [trainer.step(stream.batch(step, trainer), 3e-3) for step in range(3)]
    return found


def rank_main(rank: int, free: int, model: Path, out: Path, layout: dict) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free)}  # fmt: skip
    found = steps(model, out.parent, **layout)
    if rank == 0:
        out.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from tests.unit.tiny import checkpoint

    return checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def single(model, tmp_path_factory):
    return steps(model, tmp_path_factory.mktemp("single"))


@pytest.mark.parametrize("layout", [{}, {"pipeline_parallel": 2}, {"fsdp": True}], ids=["DP2", "PP2", "FSDP2"])
def test_two_processes_take_the_steps_of_one(model, single, tmp_path, layout):
    free = port()
    ranks = [FORKS.Process(target=rank_main, args=(r, free, model, tmp_path / "found.json", layout)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
    assert [process.exitcode for process in ranks] == [0, 0]
    found = json.loads((tmp_path / "found.json").read_text())
    for name in OBJECTIVES:
        for a, b in zip(single[name], found[name], strict=True):
            assert b == pytest.approx(a, rel=2e-3, abs=1e-5), name
    assert single["kto"][-1]["baseline"] != single["kto"][0]["baseline"]


@pytest.mark.parametrize("teacher", [False, True])
def test_context_ranks_have_every_target_with_what_belongs_to_it(teacher):
    batch = groups(teacher)
    numbers = list(range(sum(map(len, batch))))
    whole = build(batch, numbers, 320, 64)
    seen = []
    for rank in range(2):
        share = build(batch, numbers, 320, 64, Sharing(context_rank=rank, context_ranks=2))
        for name in ("mask", "sequence", "teacher" if teacher else "behaviour"):
            assert torch.equal(getattr(share, name), getattr(whole, name))
        assert torch.equal(share.targets, whole.targets[share.here])
        seen += share.here.tolist()
    assert sorted(seen) == list(range(len(whole.targets)))
    if teacher:
        assert len(whole.targets) == 3 * len(whole.teacher) and whole.behaviour is None
        own = torch.from_numpy(np.concatenate([s.tokens[s.mask > 0] for g in batch for s in g])).long()
        assert torch.equal(whole.targets.view(-1, 3)[:, 2], own)
