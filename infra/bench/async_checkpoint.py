"""How long a checkpoint keeps training waiting, written while it goes on and before it does, in turn in one process.

    python infra/bench/async_checkpoint.py [rounds] [hidden size]

blocked: time in which no step ran. lost: how much longer the save and the steps until its commit mark took than these
steps take otherwise, so what the writer took from them is in it.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from stages.model.config import ModelConfig
from stages.objectives import ce
from stages.trainer.batch import Sequence
from stages.trainer.checkpoint import Checkpoints
from stages.trainer.config import TrainConfig
from stages.trainer.trainer import Trainer

TOKENS, LENGTH = 512, 256  # of a step, of a document
PLAIN_STEPS = 5


def main(rounds: int, hidden: int) -> None:
    sizes = ModelConfig(
        num_layers=8, hidden_size=hidden, ffn_hidden_size=4 * hidden, num_attention_heads=8, num_query_groups=4,
        head_dim=hidden // 8, vocab_size=4096, sliding_window=128, logit_scale=1.0, max_position_embeddings=LENGTH,
    )  # fmt: skip
    config = TrainConfig(sequence_length=LENGTH, micro_batch_tokens=TOKENS)
    trainer = Trainer(config, sizes, lambda batch: ce.loss(batch, ce.Config()))
    tokens = np.random.default_rng(0).integers(0, 4096, (TOKENS // LENGTH, LENGTH)).astype(np.int32)
    groups = [[Sequence(row, np.ones(LENGTH, np.float32))] for row in tokens]
    found: dict[str, list[tuple[float, ...]]] = {"synchronous": [], "asynchronous": []}
    trainer.step(groups, 1e-4)
    with tempfile.TemporaryDirectory() as folder:
        kinds = {name: Checkpoints(Path(folder) / name, background=name == "asynchronous") for name in found}
        for number in range(rounds + 1):
            for name, checkpoints in kinds.items():
                times = measure(trainer, groups, checkpoints, number)
                if number:  # the first makes buffers
                    found[name].append(times)
        size = sum(file.stat().st_size for file in next((Path(folder) / "synchronous").iterdir()).iterdir())
    print(f"{sizes.parameters() / 1e6:.1f} M parameters, {size / 2**20:.0f} MiB a checkpoint, {rounds} rounds, medians")
    print(f"{'':<14}{'step (s)':>10}{'blocked (s)':>13}{'lost (s)':>10}{'steps until committed':>24}")
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    for name, (step, blocked, lost, steps) in medians.items():
        print(f"{name:<14}{step:>10.3f}{blocked:>13.3f}{lost:>10.3f}{steps:>24.0f}")
    ratio = medians["synchronous"][1] / medians["asynchronous"][1]
    print(f"asynchronous blocks {ratio:.1f} times less")


def measure(trainer: Trainer, groups: list, checkpoints: Checkpoints, number: int) -> tuple[float, ...]:
    """(seconds a step takes, blocked, lost, steps until the mark) of one save."""
    plain = statistics.median(timed(trainer.step, groups, 1e-4) for _ in range(PLAIN_STEPS))
    began = time.perf_counter()
    blocked, steps = timed(trainer.save_state, checkpoints, number, {}), 0
    while checkpoints.writing:
        trainer.step(groups, 1e-4)
        steps += 1
    blocked += timed(checkpoints.commit)
    lost = time.perf_counter() - began - steps * plain
    checkpoints.wait()
    return plain, blocked, lost, steps


def timed(function, *args) -> float:
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began


if __name__ == "__main__":
    given = [int(value) for value in sys.argv[1:]]
    main(*given, *(5, 512)[len(given) :])
