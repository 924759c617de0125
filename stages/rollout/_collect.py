"""Completions with rewards, for the stage rollout.sample and for online RL: one set of fields, one way to make them."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.stage import (
    Artifact,
    ConfigError,
    Context,
    CuveeError,
    identity,
    names,
    option,
    placement,
    resolve,
    unknown,
)
from stages.teacher.client import teachers
from stages.teacher.judge import Grader


@dataclass
class EngineConfig:
    engine: str = option("transformers", "what generates", "rollout/engines")
    engine_options: dict[str, Any] = placement({}, "where the engine is and how fast; see stages/rollout/engines/<engine>.py")

    def check_engine(self) -> None:
        """Raises ConfigError for options that the engine does not have."""
        if self.engine != "transformers":
            resolve("rollout/engines", self.engine).check_options(self.engine_options)
        elif self.engine_options:  # told here, as that engine takes torch to import
            given = ", ".join(self.engine_options)
            raise ConfigError(f"engine_options: {given} given, but engine transformers has none; remove it or choose openai")

    def make_engine(self, path: Path, ctx: Context, state: Any = None) -> Any:
        """The engine with the CHECKPOINT folder at `path`, or with other weights of it: `state`."""
        return resolve("rollout/engines", self.engine).Engine(path, ctx, state, self.engine_options)


@dataclass
class SampleConfig(EngineConfig):
    mix: dict[str, float] = option({}, "share of each domain's prompts; empty takes all domains equally")
    completions: int = option(4, "completions sampled of each prompt (k)")
    max_new_tokens: int = option(1024, "longest completion in tokens")
    temperature: float = option(1.0, "of sampling; 0 takes the likeliest token")
    with_answer: bool = option(False, "add the prompt's reference answer as one more completion")
    rewards: dict[str, float] = option(
        {}, "weight of each reward of stages/rewards, and of each judge, by name; empty takes the verifier alone"
    )
    judges: dict[str, Any] = placement({}, "teachers by name that grade completions, 0 to 1; see stages/teacher/client.py")
    judges_budget: float = placement(0.0, "most that a process spends on a judge, in its prices' currency; 0 = no limit")

    def reward_weights(self) -> dict[str, float]:
        """Name -> weight, in alphabetical order, those of weight 0 left out. A dictionary default would stay in every
        configuration that names other rewards: that is why the verifier is implied, not the default."""
        return {name: weight for name, weight in sorted((self.rewards or {"verifier": 1.0}).items()) if weight}

    def verified_by(self) -> list[str]:
        """Those of the rewards that are files of stages/rewards, not judges."""
        return [name for name in self.reward_weights() if name not in self.judges]

    def requests(self, prompts: int) -> int:
        """What the judges are asked of so many prompts."""
        return prompts * (self.completions + self.with_answer) * len(self.judges)

    def graders(self) -> dict[str, Any]:
        """What of the judges decides their grades: the model and how it is sampled, not where it runs. For the address."""
        found = {name: identity(teacher) for name, teacher in teachers(self.judges, "judges").items()}
        return {"judges": found} if found else {}

    def check_sampling(self, inputs: dict[str, Any]) -> None:
        """Raises ConfigError for what no run could sample or judge. inputs: the stage's, by argument."""
        check_mix(self.mix, inputs)
        teachers(self.judges, "judges")
        known = [*names("rewards"), *self.judges]
        for name in self.rewards:
            if name not in known:
                raise ConfigError(f"rewards: {unknown(name, known)}")
        for name in self.judges:
            if known.count(name) > 1:
                raise ConfigError(f"judges: {name} is a reward's name too (stages/rewards/{name}.py); give the judge another")
            if not self.rewards.get(name):
                raise ConfigError(f"judges: {name} has no weight in rewards; give it one, e.g. rewards={{verifier: 1.0, {name}: 0.5}}")
        if not self.reward_weights():
            raise ConfigError(
                f"rewards: {self.rewards} rewards nothing; give at least one reward a weight other than 0"
            )
        if self.rewards.get("reward_model") and "reward" not in inputs:
            raise ConfigError("rewards: reward_model has a weight, but the stage has no input `reward`; give it one")
        self.check_engine()
        if self.completions < 0 or self.completions + self.with_answer < 1 or self.max_new_tokens < 1:
            raise ConfigError(
                f"completions: {self.completions} of {self.max_new_tokens} tokens sample nothing; give at least 1 of each"
            )
        if self.temperature < 0:
            raise ConfigError(f"temperature: {self.temperature:g} is negative; give 0 (the likeliest token) or more")
        if self.max_new_tokens >= self.sequence_length:
            raise ConfigError(
                f"max_new_tokens: {self.max_new_tokens} leave no room for a prompt in sequence_length {self.sequence_length}; "
                "lower the first or raise the second"
            )


def check_mix(mix: dict[str, float], inputs: dict[str, Any]) -> None:
    """Raises ConfigError for a share of a domain without prompts, a negative one, or none at all."""
    for domain, share in mix.items():
        if domain not in inputs.get("prompts", {}):
            raise ConfigError(f"mix: {unknown(domain, sorted(inputs.get('prompts', {})))}")
        if share < 0:
            raise ConfigError(f"mix.{domain}: {share} is negative; shares are 0 or more")
    if mix and not any(mix.values()):
        raise ConfigError("mix: all shares are 0; give at least one domain a share")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:  # not splitlines(): a text may hold other line ends, such as U+2028
        return [json.loads(line) for line in file]


def read_pairs(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the inputs `pairs` and, where it is given, `own`."""
    return [row for name in ("pairs", "own") if name in inputs for row in read_jsonl(inputs[name].path / "samples.jsonl")]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows, whole or not at all: a reader after a crash finds the old file or the new one."""
    from stages.store.record import write_atomic

    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows).encode())


def load_prompts(prompts: dict[str, Artifact], mix: dict[str, float], split: str = "train") -> dict[str, list[dict]]:
    """The prompts of each domain with a share, domains in alphabetical order. Raises CuveeError for an empty one."""
    found = {}
    for domain in sorted(prompts):
        if not mix or mix.get(domain, 0.0) > 0:
            path = prompts[domain].path / f"{split}.jsonl"
            found[domain] = read_jsonl(path)
            if not found[domain]:
                raise CuveeError(f"{path} holds no prompt; raise the counts of prompts-{domain} or leave it out of mix")
    return found


def schedule(sizes: dict[str, int], mix: dict[str, float], count: int, seed: int) -> list[tuple[str, int]]:
    """`count` draws (domain, index): domains at random by their shares, each domain's items in shuffled epochs.

    A function of its arguments alone, so that a resumed run draws what the uninterrupted one would have drawn.
    """
    import numpy as np

    domains = sorted(sizes)
    shares = np.array([mix.get(d, 0.0) if mix else 1.0 for d in domains], dtype=np.float64)
    rng = np.random.default_rng(seed)
    order: dict[str, list[int]] = {d: [] for d in domains}
    found = []
    for choice in rng.choice(len(domains), size=count, p=shares / shares.sum()):
        domain = domains[choice]
        if not order[domain]:
            order[domain] = rng.permutation(sizes[domain]).tolist()
        found.append((domain, order[domain].pop()))
    return found


def render_prompt(tokenizer: Any, prompt: dict[str, Any]) -> list[int]:
    """Token ids of a prompt (a row with `messages`) up to where the assistant's answer begins."""
    from stages.chat.render import render_row

    return render_row(tokenizer, prompt, generation=True).ids


def answer_ids(tokenizer: Any, row: dict[str, Any], answer: str) -> list[int]:
    """Tokens of the assistant's turn with `answer` as they follow the rendered prompt of the row, the end of turn last: as a
    policy samples them, without what a template (ChatML: a newline) writes after it.

    Raises CuveeError when the chat template does not write a prompt as the beginning of the whole conversation.
    """
    from stages.chat.render import render_row

    prompt = render_prompt(tokenizer, row)
    whole = render_row(tokenizer, row, answer)
    if whole.ids[: len(prompt)] != prompt:
        raise CuveeError("chat template: a prompt is not the beginning of the same conversation with its answer; "
                         "mend the template, its generation prompt must be what it writes before an answer")  # fmt: skip
    turn = zip(whole.ids[len(prompt) :], whole.mask[len(prompt) :], strict=True)
    return [token for token, spoken in turn if spoken]


class Sampler:
    """Samples completions of prompts and rewards them. `engine` may be synced to new weights between calls."""

    def __init__(self, config: SampleConfig, engine: Any, ctx: Context, reward_model: Path | None):
        self.config, self.engine, self.tokenizer = config, engine, engine.tokenizer
        self.stop = self.tokenizer.eos_token_id
        self.seconds = {"generating": 0.0, "rewarding": 0.0}
        self.rewards = {
            name: resolve("rewards", name).Reward(ctx, reward_model if name == "reward_model" else None)
            for name in config.verified_by()
        }
        for name, teacher in teachers(config.judges, "judges").items():
            self.rewards[name] = Grader(name, teacher, config.judges_budget, ctx)

    def __call__(
        self, prompts: list[dict[str, Any]], seed: int, share: tuple[int, int] | None = None
    ) -> list[dict[str, Any]]:
        """One row a prompt, as in the artifact PAIRS: the prompt's own fields, `completions` (texts, special tokens
        shown, without the end of turn), `tokens` (their ids, with it), `logprobs` (nats of each token under the policy
        that sampled it; null for an answer, and for all where temperature is not 1, as the engine gives none of those),
        `rewards` (weighted sums) and `parts` (reward name -> values, null where it does not apply). The reference answer,
        if asked for, is the last completion. share: as in an engine's `generate`."""
        config, began = self.config, time.monotonic()
        ids = [render_prompt(self.tokenizer, p) for p in prompts]
        made: list[list] = [[] for _ in prompts]
        if config.completions:
            made = self.engine.generate(
                ids, n=config.completions, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                seed=seed, stop=[self.stop], share=share,
            )  # fmt: skip
        generated = time.monotonic()
        texts = [[c.text for c in row] for row in made]
        tokens = [[c.ids for c in row] for row in made]
        nats = lambda c: [round(v, 6) for v in c.logprobs] if config.temperature == 1 else None  # noqa: E731
        logprobs = [[nats(c) for c in row] for row in made]
        if config.with_answer:
            for prompt, text, token, logprob in zip(prompts, texts, tokens, logprobs, strict=True):
                text.append(prompt["answer"])
                logprob.append(None)
                token.append(answer_ids(self.tokenizer, prompt, prompt["answer"]))
        weights = config.reward_weights()
        parts = {}
        for name, reward in self.rewards.items():
            if hasattr(reward, "of_tokens"):
                parts[name] = reward.of_tokens(tokens, config.max_new_tokens)
            else:
                parts[name] = reward(prompts, texts, tokens) if name == "reward_model" else reward(prompts, texts)
        rows = []
        for i, prompt in enumerate(prompts):
            own = {name: [None if v is None else float(v) for v in values[i]] for name, values in parts.items()}
            total = [sum(weights[name] * (own[name][j] or 0.0) for name in own) for j in range(len(texts[i]))]
            rows.append({**prompt, "completions": texts[i], "tokens": tokens[i], "logprobs": logprobs[i],
                         "rewards": total, "parts": own})  # fmt: skip
        self.seconds["generating"] += generated - began
        self.seconds["rewarding"] += time.monotonic() - generated
        return rows

    def spent(self) -> dict[str, float]:
        """What each judge was asked, and for how much."""
        graders = {name: reward.client.usage[name] for name, reward in self.rewards.items() if isinstance(reward, Grader)}
        return {f"{field}/{name}": float(getattr(use, field)) for name, use in graders.items() for field in ("requests", "cost")}


def statistics(rows: list[dict[str, Any]], sampled: int) -> dict[str, float]:
    """Means over the first `sampled` completions of each row: reward, its parts, length in tokens; the share of prompts
    whose rewards differ (only those teach); `best`, the mean of each prompt's highest reward."""
    import numpy as np

    rows = [row for row in rows if row["rewards"][:sampled]]
    if not rows:
        return {}
    mean = lambda values: float(np.mean([v for row in values for v in row]))  # noqa: E731
    rewards = [row["rewards"][:sampled] for row in rows]
    found = {
        "reward": mean(rewards),
        "best": float(np.mean([max(r) for r in rewards])),
        "contrast": float(np.mean([max(row["rewards"]) > min(row["rewards"]) for row in rows])),
        "length": mean([[len(t) for t in row["tokens"][:sampled]] for row in rows]),
    }
    for name in rows[0]["parts"]:
        judged = [[v for v in row["parts"][name][:sampled] if v is not None] for row in rows]
        if any(judged):
            found[f"reward/{name}"] = mean(judged)
    return found
