"""The gate of every export: our model and transformers' give the same logits for the same folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from stages.model import weights
from stages.model.config import ModelConfig
from stages.model.cpu import cuda_names
from stages.model.folder import read_config
from stages.model.model import Model
from stages.model.packing import pack
from stages.stage import Context, CuveeError
from stages.trainer import parallel
from stages.trainer.config import TrainConfig

THRESHOLD = 1e-4  # of FP32 logits at logit scale 1
FULL = 128  # stands for the window of a model without one
LOGITS = 1 << 28  # to compare at most, 1 GiB


def check(folder: Path, ctx: Context) -> dict[str, float]:
    """Compare Megatron-core's logits with transformers' for random tokens, on sequences longer than the window.

    Returns max_abs_difference (at logit scale 1), threshold, longest (tokens) and sliding_window.
    Raises CuveeError above the threshold, or where the folder does not load.
    """
    found = parity(folder)
    ctx.log(
        f"parity with transformers: largest logit difference {found['max_abs_difference']:.2g} on sequences of up to "
        f"{found['longest']:.0f} tokens, window {found['sliding_window']:.0f}"
    )
    if not found["max_abs_difference"] <= THRESHOLD:  # NaN fails too
        raise CuveeError(
            f"{folder}: logits differ from transformers' by {found['max_abs_difference']:.3g}, allowed {THRESHOLD:g}; "
            "config.json or the weights do not describe the model that was trained, so it must not be exported"
        )
    return found


def parity(folder: Path, seed: int = 0) -> dict[str, float]:
    """What `check` returns, for any difference."""
    config = read_config(folder)
    sequences = _sequences(config, seed)
    ours, theirs = _ours(folder, config, sequences), _theirs(folder, sequences)
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / config.output_scale
    return {
        "max_abs_difference": difference,
        "threshold": THRESHOLD,
        "longest": float(max(map(len, sequences))),
        "sliding_window": float(config.sliding_window),
    }


def _sequences(config: ModelConfig, seed: int) -> list[Tensor]:
    """Random tokens in documents within, at and beyond the window, as far as the model's positions reach (and as far
    as transformers follows: Qwen v1's inference options it does not know)."""
    generator = torch.Generator().manual_seed(seed)
    window, most = config.sliding_window or FULL, config.max_position_embeddings
    if config.dynamic_ntk or config.logn_attention:
        most = config.trained_length or most
    lengths = sorted({min(n, most) for n in (window // 2 + 1, window, window + 1, 2 * window + 3, 3 * window + 1)})
    return [torch.randint(config.vocab_size, (n,), generator=generator) for n in lengths]


def _picked(sequences: list[Tensor], vocab_size: int) -> list[Tensor]:
    """Of each sequence, the positions to compare: all, or where that is too much to hold, every n-th from the last."""
    step = -(-sum(map(len, sequences)) * vocab_size // LOGITS)
    return [torch.arange(len(s) - 1, -1, -step).flip(0) for s in sequences]


def _ours(folder: Path, config: ModelConfig, sequences: list[Tensor]) -> list[Tensor]:
    """Logits [N, V] of each sequence at the picked positions, all packed into one row of documents."""
    rows, source = weights.table(config), weights.Folder(folder)
    weights.check(rows, source, str(folder))
    lengths = [len(s) for s in sequences]
    picked = _picked(sequences, config.vocab_size)
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    where = torch.cat([positions + start for positions, start in zip(picked, starts, strict=False)])
    with cuda_names(), torch.no_grad():
        parallel.initialise(TrainConfig())
        device = parallel.device()
        model = Model(config, "lm").to(device)
        weights.load(model, rows, source)
        logits = model(torch.cat(sequences)[None].to(device), pack(lengths, device), where.to(device)).cpu()
    return list(logits.split([len(positions) for positions in picked]))


def _theirs(folder: Path, sequences: list[Tensor]) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    # The plain implementation, unless its scores of every pair of tokens would not fit.
    attention = "eager" if max(map(len, sequences)) <= 4096 else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    model, device = model.to(parallel.device()), parallel.device()
    with torch.no_grad():
        return [
            model(s[None].to(device), use_cache=False, logits_to_keep=positions.to(device)).logits[0].cpu()
            for s, positions in zip(sequences, _picked(sequences, model.config.vocab_size), strict=True)
        ]
