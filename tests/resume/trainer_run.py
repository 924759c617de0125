"""A tiny training run in a process of its own, which can be told to die. Used by the resume and parallel tests."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np

from stages.model.config import ModelConfig
from stages.trainer.batch import Loss, Sequence
from stages.trainer.config import TrainConfig

# Forks of one process for all of this folder, which imports once what they run, their own module with it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "torch", "megatron.core.models.gpt", "megatron.core.optimizer", "stages.trainer.loop", "stages.train.rl",
    "stages.train._rollouts", "stages.rollout.engines.transformers", "transformers.models.cohere2.modeling_cohere2",
    "tests.resume.test_rl_kill", "tests.resume.test_objectives_parallel",
])  # fmt: skip
SIZES = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=8,
    vocab_size=288, sliding_window=16, logit_scale=1.0, max_position_embeddings=64,
)  # fmt: skip

FILE_BYTES = 20_000


def config(**changes) -> TrainConfig:
    values = dict(
        steps=12, sequence_length=64, seed=3, lr=1e-2, warmup_steps=2, micro_batch_tokens=256, save_every=3, log_every=5
    )
    return TrainConfig(**values | changes)


class Counting:
    """Documents that count upwards in steps of 1 to 3: learnable at once. Pairs share a group."""

    def __init__(self, seed: int = 0, groups: int = 12, die_at: int = -1, stop_at: int = -1):
        self.seed, self.groups, self.die_at, self.stop_at = seed, groups, die_at, stop_at
        self.asked = threading.Semaphore(0)  # released for every batch

    def batch(self, step: int, trainer) -> list[list[Sequence]]:
        self.asked.release()
        if step == self.die_at:
            die()
        if step == self.stop_at and os.environ.get("RANK", "1") == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        rng = np.random.default_rng([self.seed, step])
        return [[self._sequence(rng) for _ in range(rng.integers(1, 3))] for _ in range(self.groups)]

    @staticmethod
    def _sequence(rng: np.random.Generator) -> Sequence:
        length = int(rng.integers(2, 50))
        tokens = (rng.integers(0, 250) + rng.integers(1, 4) * np.arange(length)) % 280 + 8
        return Sequence(tokens.astype(np.int32), (rng.random(length) < 0.8).astype(np.float32), {"label": 1.0})


def pull(batch):
    """Cross-entropy with a pull to the reference model."""
    gap = batch.logprobs - batch.reference
    return Loss(((gap**2 - batch.logprobs) * batch.mask).sum(), batch.mask.sum())


def regress(batch):
    """Scores towards the number of targets."""
    goal = batch.sums(batch.mask) / 20
    return Loss(((batch.scores - goal) ** 2).sum(), float(len(batch.scores)))


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_file(folder: Path, number: int) -> None:
    """SIGKILL before the number-th time (from 1) that anything in `folder` is made, opened, renamed or removed."""
    count = itertools.count(1)

    def hook(event: str, args: tuple) -> None:
        ours = event == "os.remove" or (event in ("open", "os.mkdir", "os.rename", "os.rmdir", "shutil.rmtree")
                                        and str(args[0]).startswith(str(folder)))  # fmt: skip
        if ours and next(count) == number:
            die()

    sys.addaudithook(hook)


def save_counted(trainer, out: Path) -> None:
    """Save the weights in files of FILE_BYTES. `held-<rank>`: most bytes of tensors of its own that this rank held at once
    for that, and the digest of what hf_state gives it."""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from stages.model import weights

    there = {p.untyped_storage()._cdata for chunk in trainer.chunks for p in chunk.parameters()}
    alive, most = {}, [0]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **kwargs or {})
            for storage in (t.untyped_storage() for t in tree_leaves(found) if isinstance(t, torch.Tensor)):
                if storage._cdata not in there:
                    alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            for key in [key for key, (reference, _) in alive.items() if reference.expired()]:
                del alive[key]
            most[0] = max(most[0], sum(size for _, size in alive.values()))
            return found

    with Count():
        weights.save(trainer.chunks, trainer.rows, out, trainer.optimizer.main, FILE_BYTES)
    (out / f"held-{os.environ['RANK']}").write_text(f"{most[0]} {digest(trainer.hf_state())}")


def digest(state: dict) -> str:
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def slow_writer(stream: Counting, steps: int) -> None:
    """A checkpoint's files are written only when so many more batches have been asked for."""
    from stages.trainer.checkpoint import Checkpoints

    write = Checkpoints._write

    def later(self, *args):
        while stream.asked.acquire(blocking=False):
            pass
        for _ in range(steps):
            stream.asked.acquire(timeout=120)
        return write(self, *args)

    Checkpoints._write = later


def run(
    root: Path, tokenizer: Path, out: str = "out", die_at: int = -1, die_in: str = "", kind: str = "ce",
    init: Path | None = None, file: int = 0, slow: int = 0, stop_at: int = -1, sizes: dict | None = None, groups: int = 12,
    mirror: object = None, counted: bool = False, **changes,
) -> None:  # fmt: skip
    """Train in `root`/scratch and publish to `root`/`out`, closing metrics included.

    kind: "ce", "pull" (to the reference `init`) or "regress" (a reward head).
    die_at: SIGKILL when the batch of this step is asked for. die_in: "save", before a checkpoint is committed;
    "removal", after it, while an older one is removed; "publish", while the weights are written.
    sizes: fields of the model other than SIZES'.
    stop_at: SIGTERM (one rank only) when the batch of this step is asked for.
    file: SIGKILL at so many events of die_at_file. slow: steps that training goes on before a checkpoint is written.
    mirror: the context's. counted: see save_counted.
    """
    import torch

    from stages.objectives import ce
    from stages.stage import Context
    from stages.trainer import checkpoint
    from stages.trainer.loop import train
    from stages.trainer.trainer import Trainer

    torch.set_num_threads(1)

    stream = Counting(groups=groups, die_at=die_at, stop_at=stop_at)
    if slow:
        slow_writer(stream, slow)
    if die_in == "save":
        checkpoint.json.dump = die
    elif die_in == "removal":
        remove = shutil.rmtree
        checkpoint.shutil.rmtree = lambda path, ignore_errors=False: remove(path, True) if ignore_errors else die()
    elif die_in == "publish":
        Trainer.save_weights = die
    if counted:
        Trainer.save_weights = save_counted
    (root / "scratch").mkdir(parents=True, exist_ok=True)
    if file:
        die_at_file(root / "scratch/checkpoints", file)
    (root / out).mkdir(exist_ok=True)
    objective = {"ce": lambda b: ce.loss(b, ce.Config()), "pull": pull, "regress": regress}[kind]
    metrics = train(
        config=config(**changes), stream=stream, objective=objective, out=root / out, init=init,
        ctx=Context(root / "scratch", mirror=mirror), tokenizer=tokenizer, model=replace(SIZES, **sizes or {}), reference=init if kind == "pull" else None,
        head="reward" if kind == "regress" else "lm",
    )  # fmt: skip
    (root / out / "metrics.json").write_text(json.dumps(metrics, sort_keys=True))
