"""Supervised fine-tuning: on reference answers and conversations, or on the best of N sampled completions. Only what the
assistant says is learned; conversations are packed, and see nothing of one another.

With an input `teacher` its distribution is learned beside the answers: see stages/objectives/distill.py.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.chat.render import TURNS, render_row
from stages.rollout._collect import check_mix, load_prompts, read_jsonl, schedule
from stages.stage import Artifact, ConfigError, Context, CuveeError, Estimate, Input, Kind, option
from stages.trainer.config import TrainConfig

VERSION = "3"
INPUTS = {
    "init": Input(Kind.CHECKPOINT),
    "prompts": Input(Kind.PROMPTS, many=True, optional=True),
    "conversations": Input(Kind.CONVERSATIONS, many=True, optional=True),
    "pairs": Input(Kind.PAIRS, optional=True),
    "tokens": Input(Kind.TOKENS, optional=True),
    "teacher": Input(Kind.CHECKPOINT, optional=True),
}
OUTPUT = Kind.CHECKPOINT
DISTRIBUTED = True


@dataclass
class Config(TrainConfig):
    lr: float = option(1e-5, "peak learning rate")
    batch_groups: int = option(64, "conversations an optimizer step")
    by_size: bool = option(
        False, "batch_groups and a multiplier of lr from the number of conversations: `advice` in stages/data/conversations.py"
    )
    mix: dict[str, float] = option({}, "share of each domain's or input's conversations; empty takes all equally")
    turns: str = option("all", "assistant turns of a conversation that are learned", TURNS)
    min_reward: float = option(0.0, "with input `pairs`: prompts whose best completion is rewarded less are left out")
    replay: float = option(0.0, "pretraining documents (input `tokens`) for each conversation, 0 to 1")
    teacher_weight: float = option(0.9, "with input `teacher`: its weight in the loss, the answers have the rest")
    teacher_top_k: int = option(8, "with input `teacher`: its likeliest tokens learned in each place")


def check(config: Config, inputs: dict[str, Any]) -> None:
    config.check()
    sources = _sources(inputs)
    check_mix(config.mix, {"prompts": sources})
    if len(sources) != sum(len(inputs.get(name, {})) for name in ("prompts", "conversations")):
        raise ConfigError(f"inputs `prompts` and `conversations` have a name in common of {sorted(sources)}; rename one")
    if bool(sources) == ("pairs" in inputs):
        raise ConfigError("give the inputs `prompts` (reference answers) or `conversations`, or `pairs` (best of N) alone")
    if config.replay and "tokens" not in inputs:
        raise ConfigError(f"replay: {config.replay} asks for pretraining documents; give the input `tokens`")
    if config.batch_groups < 1 or not 0 <= config.replay <= 1:
        raise ConfigError(f"batch_groups is {config.batch_groups}, replay {config.replay}; give at least 1 and 0 to 1")
    if config.teacher_top_k < 1 or not 0 <= config.teacher_weight <= 1:
        raise ConfigError(
            f"teacher_top_k is {config.teacher_top_k}, teacher_weight {config.teacher_weight}; give at least 1 and 0 to 1"
        )


def estimate(config: Config, inputs: dict[str, Any]) -> Estimate:
    tokens = config.steps * config.batch_groups * config.sequence_length
    return Estimate(parameters=inputs["init"].parameters, train_tokens=tokens)


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Train and write the CHECKPOINT folder. Raises CuveeError when no conversation is short or good enough."""
    from transformers import AutoTokenizer

    from stages.objectives import ce, distill
    from stages.train._groups import Prepared
    from stages.trainer.loop import train

    init: Path = inputs["init"].path
    tokenizer = AutoTokenizer.from_pretrained(init)
    make = BestOfN if "pairs" in inputs else Conversations
    if config.by_size:
        config = _sized(config, inputs, ctx)
    own, module, options = make(config, inputs, tokenizer, ctx), ce, ce.Config()
    stream: Any = own
    if "teacher" in inputs:
        from stages.train._teacher import Teacher

        module, options = distill, distill.Config(weight=config.teacher_weight)
        stream = Prepared(own, Teacher(inputs["teacher"].path, init, config.teacher_top_k, ctx))
    metrics = train(
        config=config, stream=stream, objective=lambda batch: module.loss(batch, options), out=out, ctx=ctx,
        init=init, tokenizer=init,
    )  # fmt: skip
    if isinstance(own, Conversations) and own.dropped:
        ctx.log(f"{own.dropped} times a conversation was drawn that is longer than sequence_length {config.sequence_length}")
    return metrics


def _sources(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs `prompts` and `conversations` by name."""
    return {**inputs.get("prompts", {}), **inputs.get("conversations", {})}


def _sized(config: Config, inputs: dict[str, Any], ctx: Context) -> Config:
    from stages.data.conversations import advice

    files = [inputs["pairs"].path / "samples.jsonl"] if "pairs" in inputs else [
        one.path / "train.jsonl" for name, one in _sources(inputs).items() if not config.mix or config.mix.get(name)
    ]  # fmt: skip
    rows = sum(len(read_jsonl(path)) for path in files)
    found = advice(rows)
    factor = found["lr_multiplier"]
    ctx.log(f"{rows} conversations: batch_groups {found['batch_groups']}, lr {config.lr:g} x {factor:g}")
    return replace(config, batch_groups=found["batch_groups"], lr=config.lr * factor, min_lr=config.min_lr * factor)


class Conversations:
    """A Stream over prompts with their reference answers and over conversations, drawn by `mix`; those that are too long
    are left out."""

    prefetchable = True  # a batch is a function of its step; rendering it takes a tenth of a small model's step

    def __init__(self, config: Config, inputs: dict[str, Any], tokenizer: Any, ctx: Context):
        self.config, self.tokenizer, self.ctx = config, tokenizer, ctx
        self.prompts, self.dropped = load_prompts(_sources(inputs), config.mix), 0
        sizes = {domain: len(rows) for domain, rows in self.prompts.items()}
        self.drawn = schedule(sizes, config.mix, config.steps * config.batch_groups, config.seed)
        self.replay = Replay(config, inputs["tokens"]) if config.replay else None

    def batch(self, step: int, trainer: Any) -> list:
        slots = self.drawn[step * self.config.batch_groups :][: self.config.batch_groups]
        groups = [[s] for s in (self._sequence(self.prompts[domain][i]) for domain, i in slots) if s]
        if not groups:
            raise CuveeError(
                f"sequence_length: all {len(slots)} conversations of step {step} are longer than "
                f"{self.config.sequence_length} tokens; raise it or leave the domain out of mix"
            )
        return groups + (self.replay.batch(step, groups) if self.replay else [])

    def _sequence(self, prompt: dict[str, Any]):
        import numpy as np

        from stages.trainer.batch import Sequence

        rendered = render_row(self.tokenizer, prompt, prompt.get("answer"), turns=self.config.turns)
        if len(rendered.ids) > self.config.sequence_length:
            if not self.dropped:
                self.ctx.log(
                    f"{prompt['id']}: {len(rendered.ids)} tokens, sequence_length is {self.config.sequence_length}; "
                    "this conversation and all others that are too long are left out"
                )
            self.dropped += 1
            return None
        return Sequence(np.array(rendered.ids, np.int32), np.array(rendered.mask, np.float32))


class Replay:
    """Beginnings of random training documents. Each weighs as many targets as the mean conversation of its batch, so that
    `replay` is their share of the loss too, relative to the conversations'."""

    def __init__(self, config: Config, tokens: Artifact):
        from stages.data.indexed import IndexedTokens

        self.config = config
        self.files = [IndexedTokens(p.with_suffix("")) for p in sorted(tokens.path.glob("train-*.idx"))]
        self.files = [f for f in self.files if len(f)]
        if not self.files:
            raise CuveeError(f"{tokens.path} holds no training documents for sft.replay; set replay=0")

    def batch(self, step: int, groups: list) -> list:
        import numpy as np

        from stages.trainer.batch import Sequence

        rng = np.random.default_rng([self.config.seed, step])
        mean = sum(float(g[0].mask.sum()) for g in groups) / len(groups)
        shares = np.array([f.lengths.sum() for f in self.files], np.float64)
        found = []
        for which in rng.choice(len(self.files), round(self.config.replay * len(groups)), p=shares / shares.sum()):
            file = self.files[which]
            tokens = file.document(int(rng.integers(len(file))))[: self.config.sequence_length].astype(np.int32)
            if len(tokens) > 1:
                found.append([Sequence(tokens, np.full(len(tokens), mean / (len(tokens) - 1), np.float32))])
        return found


class BestOfN:
    """A Stream over each prompt's highest-rewarded completion, if rewarded at least min_reward."""

    def __init__(self, config: Config, inputs: dict[str, Any], tokenizer: Any, ctx: Context):
        from stages.train._groups import Grouper, Groups

        rows = read_jsonl(inputs["pairs"].path / "samples.jsonl")
        grouper = Grouper(tokenizer, "single", config.sequence_length, min_reward=config.min_reward)
        groups = [found for found in map(grouper, rows) if found]
        if not groups:
            raise CuveeError(
                f"min_reward: none of {len(rows)} prompts has a completion that ended, is rewarded {config.min_reward} or more "
                f"and stays within sequence_length {config.sequence_length}; lower min_reward or sample more"
            )
        ctx.log(
            f"best of N: {len(groups)} of {len(rows)} prompts have a completion rewarded {config.min_reward} or more that ended"
        )
        self.groups = Groups(groups, config.batch_groups, config.seed)
        self.replay = Replay(config, inputs["tokens"]) if config.replay else None

    def batch(self, step: int, trainer: Any) -> list:
        groups = self.groups.batch(step, trainer)
        return groups + (self.replay.batch(step, groups) if self.replay else [])
