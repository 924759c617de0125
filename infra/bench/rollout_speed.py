"""Rollouts on one GPU: tokens a second of our engine against transformers' generate(), and where an RL step's time goes.

The same Hugging Face folder, prompts, samples a prompt and stop tokens in one process. Without --folder a random model of
149 M parameters (conf/model/150m.yaml) whose completions end by chance: one token of --mean stops, as lengths of real
ones are uneven. generate() samples in BF16 with SDPA and its own cache, in batches of so many rows; ours counts with and
without what the first call costs (capturing CUDA graphs). Tokens count up to each completion's stop.

The shares are of train.rl (CoPG, BF16) on the same folder; a random model's completions are all cut at --new there.

The defaults are for a look of one or two minutes; --prompts 256 --new 512 --mean 256 --rl-steps 6 for figures to show.

    python infra/bench/rollout_speed.py [--folder F] [--prompts 128] [--samples 8] [--new 256] [--mean 128]
        [--batches 256 1024] [--rl-steps 4]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
SHORTEST, LONGEST = 32, 512  # tokens of a prompt


def random_folder(out: Path) -> Path:
    """A CHECKPOINT folder with random weights and a tokenizer of the interpreter's own library."""
    import sysconfig

    import torch
    from omegaconf import OmegaConf
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.data import tokenizer
    from stages.model import folder
    from stages.model.config import ModelConfig

    sizes = ModelConfig(**OmegaConf.load(ROOT / "conf/model/150m.yaml"))
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [file.read_text(errors="replace") for file in files]
    words = out.with_name("tokenizer")
    tokenizer.save(tokenizer.train(texts, sizes.vocab_size, 1), "command_a", words)
    out.mkdir()
    folder.write(out, sizes, words)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out), dtype=torch.float32).save_pretrained(out)
    return out


def timed(make: Callable[[], Any]) -> tuple[Any, float]:
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    found = make()
    torch.cuda.synchronize()
    return found, time.perf_counter() - began


def plain(folder: Path, prompts: list[list[int]], arguments: Any, stop: list[int], rows: int) -> float:
    """Tokens a second of generate() in batches of `rows` sequences."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    size = max(1, rows // arguments.samples)

    def batch(some: list[list[int]], new: int) -> int:
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in some], device="cuda")
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some], device="cuda")
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new,
            num_return_sequences=arguments.samples, eos_token_id=stop, pad_token_id=0,
        )[:, width:]  # fmt: skip
        stops = torch.isin(out, torch.tensor(stop, device="cuda")).long()
        return int((stops.cumsum(1) - stops == 0).sum())

    torch.manual_seed(0)
    batch(prompts[:size], 8)
    run = lambda: sum(batch(prompts[i : i + size], arguments.new) for i in range(0, len(prompts), size))  # noqa: E731
    tokens, seconds = timed(run)
    return tokens / seconds


def ours(folder: Path, prompts: list[list[int]], arguments: Any, stop: list[int]) -> tuple[float, float, int, int]:
    """Tokens a second of the first call and of the third, graphs captured, rows decoded together."""
    from stages.rollout.engines.transformers import Engine
    from stages.stage import Context

    engine = Engine(folder, Context(scratch=folder, device="cuda"))
    speeds = []
    for seed in range(3):
        make = lambda seed=seed: engine.generate(  # noqa: E731
            prompts, n=arguments.samples, max_new_tokens=arguments.new, temperature=1.0, seed=seed, stop=stop
        )
        found, seconds = timed(make)
        speeds.append(sum(len(c.ids) for row in found for c in row) / seconds)
    return speeds[0], speeds[2], len(engine.slots.graphs), engine.slots.rows


def rl(folder: Path, arguments: Any, root: Path) -> dict[str, float]:
    """The closing metrics of train.rl with rollouts at every step."""
    from stages.stage import Artifact, Context, Kind, load, parse

    rows = [{"id": str(i), "domain": "math", "messages": [{"role": "user", "content": f"Count to {i}, slowly."}],
             "answer": "x" * 1000, "check": {}} for i in range(4096)]  # fmt: skip
    for name in ("prompts", "out", "scratch"):
        (root / name).mkdir()
    (root / "prompts/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {"init": Artifact(folder, Kind.CHECKPOINT, "init", {}),
              "prompts": {"math": Artifact(root / "prompts", Kind.PROMPTS, "prompts", {})}}  # fmt: skip
    stage = load("train.rl")
    values = {
        "steps": arguments.rl_steps, "batch_groups": 64, "completions": arguments.samples, "precision": "bf16",
        "max_new_tokens": arguments.new, "sequence_length": 2048, "micro_batch_tokens": 65536, "log_every": 1,
        "save_every": 0, "rewards": {"length": 1.0},
    }  # fmt: skip
    return stage.run(parse(stage.Config, values, "rl"), inputs, root / "out", Context(root / "scratch", 8, "cuda"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    for name, default in (("prompts", 128), ("samples", 8), ("new", 256), ("mean", 128), ("rl-steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", type=int, nargs="*", default=[256, 1024])
    arguments = parser.parse_args()
    from stages.model import cuda

    cuda.prepare()
    import torch
    import transformers
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or random_folder(Path(scratch) / "model")
        tokenizer, rng = AutoTokenizer.from_pretrained(folder), random.Random(0)
        draw = lambda count: [rng.randrange(30, len(tokenizer)) for _ in range(count)]  # noqa: E731
        prompts = [draw(rng.randint(SHORTEST, LONGEST)) for _ in range(arguments.prompts)]
        stop = [tokenizer.eos_token_id]
        if not arguments.folder:
            stop = list(range(30, len(tokenizer), arguments.mean))
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}; "
              f"{arguments.prompts} prompts, {arguments.samples} samples of at most {arguments.new} tokens")  # fmt: skip
        print("| engine | rows together | tokens/s | ratio to the best generate() |\n|---|---:|---:|---:|")
        peers = [(rows, plain(folder, prompts, arguments, stop, rows)) for rows in arguments.batches]
        best = max((speed for _, speed in peers), default=float("nan"))
        for rows, speed in peers:
            print(f"| generate() | {rows} | {speed:,.0f} | {speed / best:.2f} |", flush=True)
        torch.cuda.empty_cache()
        first, steady, graphs, rows = ours(folder, prompts, arguments, stop)
        print(f"| Cuvee, first call ({graphs} graphs) | {rows} | {first:,.0f} | {first / best:.2f} |")
        print(f"| Cuvee | {rows} | {steady:,.0f} | {steady / best:.2f} |\n", flush=True)
        if arguments.rl_steps:
            found = rl(folder, arguments, Path(scratch))
            shares = {name.removeprefix("share/"): value for name, value in found.items() if name.startswith("share/")}
            print("| an RL step's time | share |\n|---|---:|")
            for name, value in sorted(shares.items(), key=lambda one: -one[1]):
                print(f"| {name} | {value:.1%} |")


if __name__ == "__main__":
    main()
