"""Train a reward model: Bradley-Terry on pairs of completions, one epoch at most.

A second look at a completion memorises it: so the pairs of a prompt, which share completions, lie in one optimizer
step (Ouyang et al., arXiv 2203.02155, section 3.5), and an epoch passes over each prompt once.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.rollout._collect import read_jsonl
from stages.stage import ConfigError, Context, CuveeError, Estimate, Input, Kind, option
from stages.trainer.config import TrainConfig

VERSION = "2"
INPUTS = {"init": Input(Kind.CHECKPOINT), "pairs": Input(Kind.PAIRS)}
OUTPUT = Kind.REWARD_MODEL
DISTRIBUTED = True


@dataclass
class Config(TrainConfig):
    lr: float = option(4e-5, "peak learning rate")
    steps: int = option(4000, "optimizer steps; cut to one epoch over the pairs")
    batch_groups: int = option(64, "prompts an optimizer step, each with all of its pairs")
    pairs_per_prompt: int = option(1, "pairs made of each prompt's completions, those furthest apart in reward first")
    min_gap: float = option(0.0, "least difference between the rewards of a pair")
    soft_label: float = option(0.0, "label a pair sigmoid(soft_label * reward gap) instead of 1; 0 = hard labels")
    margin: float = option(0.0, "ask for a score gap of margin * reward gap")
    centring: float = option(0.01, "weight of (r_w + r_l)^2, which keeps the scores' mean near 0")
    heldout: float = option(0.1, "share of the prompts kept for the accuracy on pairs not trained on")


def check(config: Config, inputs: dict[str, Any]) -> None:
    config.check()
    if config.batch_groups < 1 or config.pairs_per_prompt < 1:
        raise ConfigError(
            f"batch_groups is {config.batch_groups}, pairs_per_prompt {config.pairs_per_prompt}; give at least 1"
        )
    if not 0 < config.heldout < 1:
        raise ConfigError(f"heldout: {config.heldout} is no share; give more than 0 and less than 1")


def estimate(config: Config, inputs: dict[str, Any]) -> Estimate:
    tokens = config.steps * config.batch_groups * config.pairs_per_prompt * 2 * config.sequence_length
    return Estimate(parameters=inputs["init"].parameters, train_tokens=tokens)


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Train, write the REWARD_MODEL folder and judge the held-out pairs with it: `heldout_accuracy`, `heldout_gap`.

    Raises CuveeError when there are no pairs to train on or to hold out.
    """
    from transformers import AutoTokenizer

    from stages.objectives import bradley_terry
    from stages.train._groups import Grouper, Groups
    from stages.trainer.loop import train

    init: Path = inputs["init"].path
    rows = read_jsonl(inputs["pairs"].path / "samples.jsonl")
    kept, held_out = split(rows, config.heldout, config.seed)
    grouper = Grouper(
        AutoTokenizer.from_pretrained(init), "pair", config.sequence_length, min_gap=config.min_gap,
        soft_label=config.soft_label, margin=config.margin, per_prompt=config.pairs_per_prompt,
    )  # fmt: skip
    prompts = [groups for groups in map(grouper, kept) if groups]
    judged = [(row["domain"], group) for row in held_out for group in grouper(row)]
    pairs = sum(map(len, prompts))
    if not prompts or not judged:
        raise CuveeError(
            f"{len(rows)} prompts give {pairs} pairs to train on and {len(judged)} to hold out within "
            f"sequence_length {config.sequence_length} and min_gap {config.min_gap}; sample more prompts or completions"
        )
    steps = min(config.steps, -(-len(prompts) // config.batch_groups))
    ctx.log(f"{pairs} pairs of {len(prompts)} prompts to train on in {steps} steps, {len(judged)} held out")
    config = replace(config, steps=steps, warmup_steps=min(config.warmup_steps, steps - 1))
    config = replace(config, precision_phases=_first(config.precision_phases, steps), profile_steps=[
        min(step, steps) for step in config.profile_steps
    ])  # fmt: skip
    config = replace(config, decay_steps=min(config.decay_steps, steps - config.warmup_steps))
    options = bradley_terry.Config(centring=config.centring)
    metrics = train(
        config=config, stream=Groups(prompts, config.batch_groups, config.seed),
        objective=lambda batch: bradley_terry.loss(batch, options), out=out, ctx=ctx, init=init, tokenizer=init,
        head="reward",
    )  # fmt: skip
    return metrics | {"pairs": pairs, "heldout_pairs": len(judged), **judge(judged, out, ctx)}


def _first(phases: list[list[Any]], steps: int) -> list[list[Any]]:
    """The part of [[precision, steps], ...] that the first `steps` take."""
    found = []
    for name, count in phases:
        if steps > 0:
            found.append([name, min(count, steps)])
        steps -= count
    return found


def split(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(to train on, held out) by prompt: all rows of one prompt lie on the same side."""
    import numpy as np

    prompts = sorted({(row["domain"], row["id"]) for row in rows})
    order = np.random.default_rng(seed).permutation(len(prompts))
    chosen = {prompts[i] for i in order[: max(1, round(share * len(prompts)))]}
    sides: tuple[list[dict], list[dict]] = ([], [])
    for row in rows:
        sides[(row["domain"], row["id"]) in chosen].append(row)
    return sides


def judge(pairs: list, model: Path, ctx: Context) -> dict[str, float]:
    """Of (domain, pair) that were not trained on: accuracy (share in which the preferred completion scores higher), over
    all and by domain, and the mean score gap."""
    import numpy as np

    from stages.rewards.reward_model import Scorer

    scores = Scorer(model, ctx)([s.tokens.tolist() for _, pair in pairs for s in pair])
    gaps = np.array(scores[0::2]) - np.array(scores[1::2])
    found = {"heldout_accuracy": float((gaps > 0).mean()), "heldout_gap": float(gaps.mean())}
    domains = np.array([domain for domain, _ in pairs])
    return found | {
        f"heldout_accuracy/{d}": float((gaps[domains == d] > 0).mean()) for d in sorted(set(domains.tolist()))
    }
