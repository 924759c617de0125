"""Training speed on one GPU against what a user would pick instead, all in turn in one process, and the ratios.

1.07 B parameters (conf/model/1b.yaml): 16 layers, hidden 2048, ffn 8192, 16 heads, 8 key/value groups, vocabulary 32,768.
Steps of 8 sequences of 8192 random tokens with AdamW in FP32; the median of blocks of three steps. Contenders:

    transformers   LlamaForCausalLM, BF16 autocast, SDPA, fused AdamW, the same parameters
    llama-*        the same architecture in Cuvee (sequential blocks, full attention)
    command_a-*    Command A's block (parallel, three layers of four in windows of 4096), the same parameters
    command_a_256000-*  the same with a vocabulary of 256,000 (1.53 B parameters): no FP32 logits of a whole batch

    python infra/bench/training_speed.py [contender[:sequences of a microbatch] ...] [--blocks N]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from stages.model.config import ModelConfig

LENGTH, SEQUENCES, STEPS = 8192, 8, 3
COMMAND_A = ModelConfig(
    num_layers=16, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=16, num_query_groups=8, head_dim=128,
    vocab_size=32768, sliding_window=4096, logit_scale=0.25, max_position_embeddings=LENGTH,
)  # fmt: skip
MODELS = {
    "command_a": COMMAND_A,
    "command_a_256000": replace(COMMAND_A, vocab_size=256000),
    "llama": replace(COMMAND_A, family="llama", sliding_window=0, logit_scale=1.0),
}
DEFAULT = ("transformers:2", "transformers:4", "llama-bf16:4", "llama-fp8_delayed:4", "command_a-bf16:4",
           "command_a-fp8_delayed:4", "command_a-fp8_tensorwise:4", "command_a-fp8_blockwise:4", "command_a_256000-bf16:4")  # fmt: skip


def transformers(sequences: int) -> Callable[[], float]:
    """A step of the model that a user of transformers would train."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = MODELS["llama"]
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size, intermediate_size=sizes.ffn_hidden_size,
        num_hidden_layers=sizes.num_layers, num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_query_groups, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        attn_implementation="sdpa", use_cache=False,
    )).cuda()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(sizes.vocab_size, (SEQUENCES // sequences, sequences, LENGTH), device="cuda")

    def step() -> float:
        for part in tokens:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=part, labels=part).loss
            (loss / len(tokens)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def cuvee(name: str, sequences: int) -> Callable[[], float]:
    """A step of Cuvee's trainer, data handling included."""
    import numpy as np

    from stages.objectives import ce
    from stages.trainer.batch import Sequence
    from stages.trainer.config import TrainConfig
    from stages.trainer.trainer import Trainer

    model, precision = name.split("-")
    config = TrainConfig(lr=1e-4, precision=precision, micro_batch_tokens=sequences * LENGTH, sequence_length=LENGTH)
    trainer = Trainer(config, MODELS[model], partial(ce.loss, config=ce.Config()))
    rng, mask = np.random.default_rng(0), np.ones(LENGTH, np.float32)

    def step() -> float:
        tokens = rng.integers(MODELS[model].vocab_size, size=(SEQUENCES, LENGTH), dtype=np.int32)
        return trainer.step([[Sequence(row, mask)] for row in tokens], 1e-4)["loss"]

    return step


def measure(contender: str, blocks: int) -> tuple[float, float]:
    """(tokens a second, peak GiB) of a contender."""
    import torch

    name, _, sequences = contender.partition(":")
    step = transformers(int(sequences)) if name == "transformers" else cuvee(name, int(sequences))
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 + blocks):  # the first warms up
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return STEPS * SEQUENCES * LENGTH / statistics.median(seconds[1:]), torch.cuda.max_memory_allocated() / 2**30


def flops_a_token(contender: str) -> float:
    import numpy as np

    from stages.trainer.flops import training_flops

    sizes = MODELS[contender.partition("-")[0]] if "-" in contender else MODELS["llama"]
    return training_flops(sizes, np.array([LENGTH]), LENGTH - 1, "lm") / LENGTH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", default=DEFAULT)
    parser.add_argument("--blocks", type=int, default=3)
    arguments = parser.parse_args()
    from stages.model import cuda

    cuda.prepare()
    import torch

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; sequence {LENGTH}, {SEQUENCES} a step")
    print("| contender | sequences a microbatch | tokens/s | TFLOP/s | GiB | ratio |\n|---|---:|---:|---:|---:|---:|")
    first = None
    for contender in arguments.contenders:
        speed, memory = measure(contender, arguments.blocks)
        first = first or speed
        name, _, sequences = contender.partition(":")
        work = speed * flops_a_token(name) / 1e12
        print(f"| {name} | {sequences} | {speed:,.0f} | {work:.0f} | {memory:.1f} | {speed / first:.2f} |", flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
