"""Suites of held-out prompts: which of them a stage takes, what a model answers to them, and whether the training text
held them."""

import json
from dataclasses import dataclass
from typing import Any

from stages.rollout._collect import EngineConfig, read_jsonl, render_prompt
from stages.stage import Artifact, ConfigError, Context, CuveeError, option, resolve


@dataclass
class Suite(EngineConfig):
    prompts_per_domain: int = option(500, "held-out prompts a domain, the first ones after `skip`; 0 takes all")
    skip: int = option(0, "held-out prompts a domain passed over: to choose by others than those that are reported")
    max_new_tokens: int = option(1024, "longest completion in tokens; the scored one is greedy")

    def check_suite(self, inputs: dict[str, Any]) -> None:
        """Raises ConfigError for counts below 0, and where `skip` leaves none of the prompts that will be generated."""
        self.check_engine()
        if self.skip < 0 or self.prompts_per_domain < 0 or self.max_new_tokens < 1:
            raise ConfigError(
                f"skip is {self.skip}, prompts_per_domain {self.prompts_per_domain}, max_new_tokens "
                f"{self.max_new_tokens}; give at least 0, 0 and 1"
            )
        for domain, prompts in inputs.get("prompts", {}).items():  # a plan's are the configurations of data.prompts
            left = getattr(prompts, "heldout", self.skip + 1)
            if left <= self.skip and not prompts.heldout_files:
                raise ConfigError(
                    f"skip: {self.skip} leaves none of the {left} held-out prompts of {domain}; raise its `heldout`"
                )


def held_out(sources: dict[str, Artifact], count: int, skip: int = 0) -> list[dict[str, Any]]:
    """`count` held-out prompts of each domain (0: all), after the first `skip`. Raises CuveeError for a domain without."""
    found = []
    for domain in sorted(sources):  # not in the recipe's order of experts, which is no part of the address
        path = sources[domain].path / "heldout.jsonl"
        rows = read_jsonl(path)[skip:]
        if not rows:
            raise CuveeError(f"{path} holds no prompt{f' after the first {skip}' if skip else ''}; raise the held-out "
                             f"count of prompts-{domain}")  # fmt: skip
        found += rows[: count or None]
    return found


def answer(
    config: Any, model: Artifact, prompts: list[dict], ctx: Context, samples_each: int = 0
) -> list[dict[str, Any]]:
    """Each prompt with its greedy completion, the verifier's reward and the score; with `samples_each` also
    `reward_sampled`, the mean reward of so many completions at temperature 1. config: an EngineConfig with max_new_tokens."""
    from transformers import AutoTokenizer

    from stages.chat.render import response

    tokenizer = AutoTokenizer.from_pretrained(model.path)
    stop = tokenizer.eos_token_id
    engine = config.make_engine(model.path, ctx)
    verifier = resolve("rewards", "verifier").Reward(ctx, None)
    samples = []
    for domain, rows in by(prompts, "domain").items():
        ids = [render_prompt(tokenizer, row) for row in rows]
        made = engine.generate(ids, n=1, max_new_tokens=config.max_new_tokens, temperature=0.0, seed=0, stop=[stop])
        if samples_each:
            drawn = engine.generate(
                ids, n=samples_each, max_new_tokens=config.max_new_tokens, temperature=1.0, seed=0, stop=[stop]
            )
            made = [[*first, *rest] for first, rest in zip(made, drawn, strict=True)]
        rewards = verifier(rows, [[one.text for one in some] for some in made])
        for row, (one, *_), (reward, *others) in zip(rows, made, rewards, strict=True):
            samples.append({
                **row, "text": one.text, "completion": response(one.text), "reward": reward, "score": max(reward, 0.0),
                "length": row.get("length"), "tokens": len(one.ids), "ended": stop in one.ids, "ids": one.ids,
                **({"reward_sampled": sum(others) / len(others)} if others else {}),
            })  # fmt: skip
        mean = sum(sample["score"] for sample in samples[-len(rows) :]) / len(rows)
        ctx.log(f"{domain}: {mean:.3f} on {len(rows)} prompts")
    return samples


def judge(samples: list[dict[str, Any]], reward: Artifact, ctx: Context) -> None:
    """Add the reward model's score of each completion, the basis of win rates."""
    score_of = resolve("rewards", "reward_model").Reward(ctx, reward.path)
    found = score_of(samples, [[sample["text"]] for sample in samples], [[sample["ids"]] for sample in samples])
    for sample, (score,) in zip(samples, found, strict=True):
        sample["reward_model"] = score


def by(rows: list[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    """The rows grouped by row[key], groups in the order of their first row."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def contamination(prompts: Artifact, corpus: Artifact) -> str:
    """Why the held-out prompts may occur in the corpus' training split; "" where curation kept them out.

    prompts: a PROMPTS artifact. corpus: the CORPUS artifact that was trained on, whose `decontaminated.json` says against
    which files (by SHA-256), and whether against its own held-out documents, which the prompts of some tasks quote.
    """
    path = corpus.path / "decontaminated.json"
    if not path.exists():
        return "the corpus does not say against what it was decontaminated"
    told, config = json.loads(path.read_text(encoding="utf-8")), prompts.record.get("config", {})
    against, digests = {suite["digest"] for suite in told["suites"]}, prompts.record.get("external", {})
    for file in config.get("heldout_files", []):
        if digests.get(file) not in against:
            return f"{file} is not among data.benchmarks"
    quotes = config.get("heldout") and getattr(resolve("tasks", config["domain"]), "DOCUMENTS", False)
    loose = quotes and not told["heldout"]
    return "its prompts quote held-out documents, which no block decontaminate kept out" if loose else ""
