"""Training speed and memory of one GPU as the context grows, 8k to 256k tokens, at 262,144 tokens a step.

A model of 150 M parameters (conf/model/150m.yaml: Command A's block, three layers of four in windows of 1024), BF16,
AdamW; each sequence is one document of random tokens. The median of three steps after the first.

    python infra/bench/long_context.py [length ...] [--recompute none|selective|full]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
TOKENS = 262_144


def measure(length: int, recompute: str) -> tuple[float, float, float]:
    """(tokens a second, model TFLOP/s, peak GiB) at sequences of `length` tokens."""
    import numpy as np
    import torch
    import yaml

    from stages.model.config import ModelConfig
    from stages.objectives import ce
    from stages.trainer.batch import Sequence
    from stages.trainer.config import TrainConfig
    from stages.trainer.flops import training_flops
    from stages.trainer.trainer import Trainer

    values = yaml.safe_load((ROOT / "conf/model/150m.yaml").read_text())
    sizes = ModelConfig(**values | {"max_position_embeddings": length})
    config = TrainConfig(
        precision="bf16", sequence_length=length, micro_batch_tokens=max(length, 32768), recompute=recompute
    )
    trainer = Trainer(config, sizes, partial(ce.loss, config=ce.Config()))
    rng, mask = np.random.default_rng(0), np.ones(length, np.float32)
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(4):
        tokens = rng.integers(sizes.vocab_size, size=(TOKENS // length, length), dtype=np.int32)
        torch.cuda.synchronize()
        began = time.perf_counter()
        trainer.step([[Sequence(row, mask)] for row in tokens], 1e-4)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    speed = TOKENS / statistics.median(seconds[1:])
    work = training_flops(sizes, np.full(TOKENS // length, length), TOKENS - TOKENS // length) / TOKENS
    return speed, speed * work / 1e12, torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", nargs="*", type=int, default=[8192, 32768, 131072, 262144])
    parser.add_argument("--recompute", default="none")
    arguments = parser.parse_args()
    from stages.model import cuda

    cuda.prepare()
    import torch

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; recompute {arguments.recompute}")
    print("| context | tokens/s | TFLOP/s | GiB |\n|---:|---:|---:|---:|")
    for length in arguments.lengths:
        speed, work, memory = measure(length, arguments.recompute)
        print(f"| {length:,} | {speed:,.0f} | {work:.0f} | {memory:.1f} |", flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
