"""Models, prompts and runs of stages for tests of post-training; what several tests share is made in conftest.py."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tiny import artifact, context, jsonl, tokenizer

from stages.chat.template import END_OF_TURN, SPECIAL_TOKENS
from stages.stage import Kind, load, parse

COMMON = {"sequence_length": 128, "schedule": "constant", "weight_decay": 0.0, "beta2": 0.99, "log_every": 1000}
RL = {**COMMON, "max_new_tokens": 4, "batch_groups": 8, "completions": 4, "lr": 0.003, "options": {"beta": 0.02}}


def save_checkpoint(path: Path, hidden: int = 32, layers: int = 4, window: int = 8, seed: int = 0, std=0.02) -> Path:
    """A random Cohere2 CHECKPOINT folder (3 sliding-window layers and 1 full) with a tokenizer of 276 tokens and 320 rows
    of vocabulary; a larger `std` makes sharper predictions."""
    from transformers import Cohere2Config, Cohere2ForCausalLM

    tokenizer(path)
    torch.manual_seed(seed)
    kinds = ["full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(layers)]
    config = Cohere2Config(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        sliding_window=window,
        sliding_window_pattern=4,
        layer_types=kinds,
        logit_scale=0.25,
        initializer_range=std,
        rope_theta=50000.0,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=5,
        eos_token_id=SPECIAL_TOKENS.index(END_OF_TURN),
    )
    Cohere2ForCausalLM(config).save_pretrained(path)
    return path


def run(stage: str, values: dict, folder: Path, scratch: Path | None = None, **inputs) -> dict[str, float]:
    """The stage as stages.run would run it; its artifact is `folder`."""
    module = load(stage)
    config = parse(module.Config, values, stage)
    module.check(config, inputs)
    folder.mkdir(parents=True, exist_ok=True)
    return module.run(config, inputs, folder, context(scratch or folder.with_name(folder.name + "-scratch")))


def number_prompts(path: Path, answers: int, target: int = 7, seed: int = 0, count: int = 64):
    """Prompts of the math task's shape: `Pick a number, <name>`, answered by a digit at random; right is `target`."""
    rng = random.Random(seed)
    rows = [
        {
            "id": f"n{i}",
            "domain": "math",
            "messages": [{"role": "user", "content": f"Pick {rng.randrange(1000)}"}],
            "answer": str(rng.randrange(answers)),
            "check": {"number": target},
        }
        for i in range(count)
    ]
    jsonl(path / "train.jsonl", rows)
    jsonl(path / "heldout.jsonl", rows[:16])
    return artifact(path, Kind.PROMPTS)


def accuracy(model: Path, prompts) -> float:
    """Mean verifier reward of greedy answers to held-out prompts."""
    from stages.chat.render import render
    from stages.rewards.verifier import Reward
    from stages.rollout.engines.transformers import Engine

    engine = Engine(model, context(model.parent / "engine"))
    rows = [json.loads(line) for line in (prompts.path / "heldout.jsonl").read_text().splitlines()]
    ids = [render(engine.tokenizer, r["messages"], generation=True).ids for r in rows]
    stop = engine.tokenizer.eos_token_id
    made = engine.generate(ids, n=1, max_new_tokens=8, temperature=0.0, seed=0, stop=[stop])
    rewards = Reward()(rows, [[c.text for c in row] for row in made])
    return sum(max(r[0], 0.0) for r in rewards) / len(rewards)


class Fixed:
    """A Stream of the same groups in every step."""

    def __init__(self, groups: list):
        self.groups = groups

    def batch(self, step: int, trainer) -> list:
        return self.groups


class Killed(Exception):
    pass


def killed_at(monkeypatch, stream: type, at: int, stage: str, values: dict, folder: Path, **inputs) -> None:
    """Run the stage until `stream` has given the groups of step `at`, and no further."""
    batch = stream.batch

    def until(self, step, trainer):
        found = batch(self, step, trainer)
        if step == at:
            raise Killed
        return found

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stream, "batch", until)
        run(stage, values, folder, **inputs)
