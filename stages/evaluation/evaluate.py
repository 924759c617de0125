"""Score one model on every domain's held-out prompts, by verifiers and a reward model; perplexity on held-out text."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.chat.messages import said
from stages.evaluation._suites import Suite, answer, by, contamination, held_out, judge
from stages.stage import Artifact, ConfigError, Context, CuveeError, Estimate, Input, Kind, identity, option

VERSION = "5"
INPUTS = {
    "model": Input(Kind.CHECKPOINT),
    "prompts": Input(Kind.PROMPTS, many=True),
    "tokens": Input(Kind.TOKENS, optional=True),
    "reward": Input(Kind.REWARD_MODEL, optional=True),
    "corpus": Input(Kind.CORPUS, optional=True),
}
OUTPUT = Kind.SCORES
SHOWN = 400  # characters kept of each end of a prompt, for a reader; the artifact `prompts` holds all of it


@dataclass
class Config(Suite):
    samples: int = option(
        0, "completions sampled of each prompt at temperature 1 besides; the mean of their rewards is what RL raises"
    )
    contaminated: str = option(
        "mark", "with input `corpus`: what becomes of a suite that was not kept out of it", ("mark", "refuse")
    )
    perplexity_tokens: int = option(1_000_000, "held-out tokens a domain for perplexity")
    perplexity_length: int = option(8192, "longest piece of a document for perplexity, in tokens")
    dtype: str = option("bfloat16", "precision of the perplexity pass", ("float32", "bfloat16"))
    batch_tokens: int = option(65536, "tokens of a batch of the perplexity pass; decides the last digits")


def check(config: Config, inputs: dict[str, Any]) -> None:
    config.check_suite(inputs)
    for name in ("perplexity_length", "perplexity_tokens", "batch_tokens"):
        if getattr(config, name) < 2:
            raise ConfigError(f"{name}: {getattr(config, name)} scores nothing; give at least 2")
    if config.samples < 0:
        raise ConfigError(f"samples: {config.samples} is negative; 0 samples none")


def estimate(config: Config, inputs: dict[str, Any]) -> Estimate:
    prompts = len(inputs["prompts"]) * (config.prompts_per_domain or 500)
    generated = prompts * (1 + config.samples) * config.max_new_tokens
    return Estimate(parameters=inputs["model"].parameters, generated_tokens=generated)


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Write `scores.json` and `samples.jsonl` (a line a prompt). Returns the mean score of each domain.

    A domain's score is the mean of max(reward, 0) over its prompts, in [0, 1]: a refused format, which training
    punishes with -1, counts as 0. `solved` is the share of prompts with full reward.
    Raises CuveeError when the model's tokenizer is not the one behind the tokens or the reward model, and with
    contaminated=refuse for a suite that was not kept out of the training text.
    """
    from transformers.utils import logging

    from stages.merge.checkpoint import digest, tokenizer_digests

    logging.disable_progress_bar()
    model: Artifact = inputs["model"]
    digests = tokenizer_digests(model.path)
    _require_same_tokenizer(digests, inputs)
    contaminated = _contaminated(config, inputs, ctx)
    prompts = held_out(inputs["prompts"], config.prompts_per_domain, config.skip)
    samples = answer(config, model, prompts, ctx, config.samples)
    if "reward" in inputs:
        judge(samples, inputs["reward"], ctx)
    suites = {domain: digest(one.path / "heldout.jsonl") for domain, one in inputs["prompts"].items()}
    scores = {
        "digests": {**digests, "prompts": suites},
        "engine": identity(config) | {"temperature": 0.0},
        "contaminated": contaminated,
        "domains": {domain: summary(rows) for domain, rows in by(samples, "domain").items()},
        "lengths": {
            domain: {str(length): summary(some) for length, some in sorted(by(rows, "length").items())}
            for domain, rows in by(samples, "domain").items()
            if all(row["length"] is not None for row in rows)
        },
        "perplexity": _perplexity(config, model, inputs["tokens"], ctx) if "tokens" in inputs else {},
    }
    (out / "scores.json").write_text(json.dumps(scores, indent=1, sort_keys=True) + "\n")
    with open(out / "samples.jsonl", "w", encoding="utf-8") as file:
        for row in samples:
            *before, last = row["messages"]
            turns = [f"[{message['role']}] {said(message)}" for message in before] + [said(last)]
            row["prompt"] = _shorten("\n".join(turns))
            kept = {k: v for k, v in row.items() if k not in ("messages", "check", "text", "ids") and v is not None}
            file.write(json.dumps(kept, sort_keys=True, ensure_ascii=False) + "\n")
    return metrics(scores)


def metrics(scores: dict[str, Any]) -> dict[str, float]:
    """The closing metrics: `score/<domain>` and their mean, `bits_per_byte/<domain>`."""
    means = {domain: one["mean"] for domain, one in scores["domains"].items()}
    return {
        "score": sum(means.values()) / len(means),
        **{f"score/{domain}": mean for domain, mean in means.items()},
        **{f"bits_per_byte/{domain}": one["bits_per_byte"] for domain, one in scores["perplexity"].items()},
    }


def _require_same_tokenizer(digests: dict[str, str], inputs: dict[str, Any]) -> None:
    from stages.merge.checkpoint import tokenizer_digests

    others = {"tokens": ("tokenizer", "tokenizer"), "reward": ("", "tokenizer template")}
    for arg, (folder, parts) in others.items():
        if arg in inputs:
            found = tokenizer_digests(inputs[arg].path / folder)
            for part in parts.split():
                if found[part] != digests[part]:
                    raise CuveeError(
                        f"the model's {part} ({digests[part][:12]}) is not that of the input {arg} "
                        f"({found[part][:12]}); evaluate a model with artifacts of its own tokenizer"
                    )


def _contaminated(config: Config, inputs: dict[str, Any], ctx: Context) -> dict[str, str]:
    """Domain -> why its suite may have been trained on, of those for which that is so."""
    if "corpus" not in inputs:
        return {}
    found = {d: contamination(one, inputs["corpus"]) for d, one in sorted(inputs["prompts"].items())}
    found = {domain: why for domain, why in found.items() if why}
    for domain, why in found.items():
        if config.contaminated == "refuse":
            raise CuveeError(f"contaminated: the suite {domain} was not kept out of the training text ({why}); add it to "
                             "data.benchmarks with the block decontaminate, or set contaminated=mark")  # fmt: skip
        ctx.log(f"{domain}: not decontaminated, {why}")
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """`mean` score, its 95 % interval `low` to `high`, and what else describes the samples of a domain or length."""
    from stages.evaluation.stats import wilson

    n = len(rows)
    mean, low, high = wilson([row["score"] for row in rows])
    solved, solved_low, solved_high = wilson([float(row["reward"] >= 1.0) for row in rows])
    found = {
        "n": n, "mean": mean, "low": low, "high": high,
        "solved": solved, "solved_low": solved_low, "solved_high": solved_high,
        "reward": sum(row["reward"] for row in rows) / n,
        "tokens": sum(row["tokens"] for row in rows) / n,
        "ended": sum(row["ended"] for row in rows) / n,
    }  # fmt: skip
    for field in ("reward_model", "reward_sampled"):
        if all(field in row for row in rows):
            found[field] = sum(row[field] for row in rows) / n
    return found


def _perplexity(config: Config, model: Artifact, tokens: Artifact, ctx: Context) -> dict[str, dict[str, float]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stages.evaluation.perplexity import byte_lengths, measure, windows
    from stages.model.inference import extend

    dtype = getattr(torch, config.dtype)
    network = extend(AutoModelForCausalLM.from_pretrained(model.path, dtype=dtype)).to(ctx.device).eval()
    bytes_of = byte_lengths(AutoTokenizer.from_pretrained(model.path), network.config.vocab_size)
    splits = json.loads((tokens.path / "tokens.json").read_text(encoding="utf-8"))["splits"]
    found = {}
    for domain in sorted(splits.get("heldout", {})):
        pieces = windows(tokens.path / f"heldout-{domain}", config.perplexity_tokens, config.perplexity_length)
        if pieces:
            found[domain] = measure(network, pieces, bytes_of, config.batch_tokens)
            ctx.log(f"{domain}: {found[domain]['bits_per_byte']:.3f} bits a byte")
    return found


def _shorten(text: str) -> str:
    return text if len(text) <= 2 * SHOWN + 20 else f"{text[:SHOWN]}\n[...]\n{text[-SHOWN:]}"
