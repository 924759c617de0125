"""Rows of PAIRS (completions with rewards) to groups of sequences, in the shape that an objective asks for.

An objective's GROUP says what a group is: "single" (one conversation), "pair" (preferred and other), "revisions" (the six
sequences of a pair that SRPO needs), "completions" (all k of a prompt, with their rewards). Every sequence carries the
same fields: reward, chosen, draft, label, margin, sft (see stages/objectives); sft is 1 on the plain preferred one if it ended.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.rollout._collect import answer_ids, render_prompt
from stages.stage import ConfigError, CuveeError, identity, option, parse, resolve
from stages.trainer.batch import Group, Loss, Packed, Sequence

REVISE = "Improve your answer."  # the user's turn after a draft, from which the policy answers again (SRPO's reviser)
SMALLEST_GAP = 1e-9  # between rewards: less is the rounding of their sum


@dataclass
class ObjectiveConfig:
    objective: str = option("copg", "what is optimised", "objectives")
    options: dict[str, Any] = option({}, "options of the objective, e.g. beta; see stages/objectives/<objective>.py")
    sft_weight: float = option(
        0.0, "weight of a cross-entropy term on each group's best completion, averaged over its tokens; beside CoPG's sums over "
        "the tokens of k completions a weight of about k is felt",
    )
    min_gap: float = option(0.0, "least difference between the highest and the lowest reward of a group")
    mask_special: bool = option(
        False, "leave special tokens (the end of a turn, a call's marks) out of what is compared and learned"
    )

    def resolve(self, *groups: str) -> tuple[Any, Any]:
        """(module, its Config). Raises ConfigError for an unknown option, or an objective whose GROUP is another."""
        module = resolve("objectives", self.objective)
        if module.GROUP not in groups:
            raise ConfigError(
                f"objective: {self.objective} trains on {module.GROUP}; this stage gives {', '.join(groups)}"
            )
        if module.NEEDS_SCORES:
            raise ConfigError(f"objective: {self.objective} trains a reward model; use the stage train.reward for it")
        options = parse(module.Config, self.options, "options")
        if getattr(options, "beta", 1.0) <= 0:
            raise ConfigError(f"options.beta: {options.beta} leaves no pull to the reference; give more than 0")
        if hasattr(options, "check"):
            options.check()
        if self.sft_weight and module.COUNT != "groups":
            raise ConfigError(
                f"sft_weight: {self.sft_weight} weighs a term of each group, but {self.objective} is a mean over "
                f"{module.COUNT}; set 0 or choose another objective"
            )
        return module, options

    def external(self) -> dict[str, Any]:
        """The objective's whole configuration, defaults included: a changed default must change the address."""
        module = resolve("objectives", self.objective)
        return {"options": identity(parse(module.Config, self.options, "options"))}


def needs_values(module: Any) -> bool:
    """Whether an objective reads the advantages that a value network gives each token."""
    return getattr(module, "NEEDS_VALUES", False)


def fewest(module: Any) -> int:
    """How many completions of a prompt teach the objective something: one where each counts by itself (KTO)."""
    return 1 if module.COUNT == "sequences" else 2


def grouper_of(config: ObjectiveConfig, module: Any, tokenizer: Any, **limits: Any) -> "Grouper":
    """The Grouper of the objective `module`: with dynamic sampling completions rewarded alike make no group."""
    least = max(config.min_gap, SMALLEST_GAP) if getattr(module, "DYNAMIC_SAMPLING", False) else config.min_gap
    return Grouper(
        tokenizer, module.GROUP, config.sequence_length, min_gap=least, mask_special=config.mask_special,
        fewest=fewest(module), **limits,
    )  # fmt: skip


def objective(config: ObjectiveConfig, *groups: str) -> Callable[[Packed], Loss]:
    """The objective with its options, plus sft_weight times the mean negative log-likelihood of the tokens of each
    group's sequence with sft = 1 (Pang et al., arXiv 2404.19733, eq. 1: the NLL divided by the length)."""
    module, options = config.resolve(*groups)

    def loss(batch: Packed) -> Loss:
        from stages.objectives._common import length

        found = module.loss(batch, options)
        if config.sft_weight:
            mean = -batch.sums(batch.logprobs) / length(batch).clamp(min=1)
            nll = (mean * batch.fields["sft"]).sum()
            found.sum = found.sum + config.sft_weight * nll
            found.metrics["nll"] = nll.detach()
        return found

    return loss


def prepared(module: Any, stream: Any) -> Any:
    """The stream; where the objective has `prepare(groups, trainer)`, with each step's groups as that returns them."""
    return Prepared(stream, module.prepare) if hasattr(module, "prepare") else stream


@dataclass
class Prepared:
    """A Stream whose groups an objective completes by what only the whole batch of a step can tell."""

    stream: Any
    prepare: Callable[[list[Group], Any], list[Group]]

    def batch(self, step: int, trainer: Any) -> list[Group]:
        groups = self.stream.batch(step, trainer)
        return self.prepare(groups, trainer) if groups else groups


def make_sequence(
    prompt: list[int], completion: list[int], logprobs: list[float] | None = None, **fields: float
) -> Sequence:
    """The prompt and the completion it is followed by; only the completion is a target. logprobs: those of the
    completion's tokens under the policy that sampled them."""
    tokens = np.array(prompt + completion, np.int32)
    mask = np.zeros(len(tokens), np.float32)
    mask[len(prompt) :] = 1
    empty = {"reward": 0.0, "chosen": 1.0, "draft": -1.0, "label": 1.0, "margin": 0.0, "sft": 0.0}
    behaviour = None if logprobs is None else np.array([0.0] * len(prompt) + logprobs, np.float32)
    return Sequence(tokens, mask, empty | fields, behaviour)


class Grouper:
    """Builds groups of one kind. Limits: sequence_length in tokens; the highest and lowest reward of a
    group differ by min_gap at least, and those of a pair always differ; a single one is rewarded min_reward at least.

    soft_label s > 0 labels a pair p = sigmoid(s * gap) instead of 1; margin m asks for a score gap of m * gap.
    behaviour: `completions` carry the log-probabilities of their sampling; CuveeError for a row without. mask_special:
    special tokens are no targets: in both of a pair they would be raised and lowered (Llama 3, arXiv 2407.21783, 4.1.4).
    fewest: completions of a prompt that make a group. What was cut off is never imitated, for it would teach not to stop.
    """

    def __init__(
        self, tokenizer: Any, kind: str, sequence_length: int, *, min_gap=0.0, soft_label=0.0, margin=0.0, per_prompt=1,
        behaviour=False, mask_special=False, min_reward=float("-inf"), fewest=2,
    ):  # fmt: skip
        self.tokenizer, self.kind, self.sequence_length = tokenizer, kind, sequence_length
        self.masked = [i for i, t in tokenizer.added_tokens_decoder.items() if t.special] if mask_special else []
        self.min_gap, self.soft_label, self.margin, self.per_prompt = min_gap, soft_label, margin, per_prompt
        self.behaviour, self.min_reward, self.fewest = behaviour, min_reward, fewest

    def __call__(self, row: dict[str, Any]) -> list[Group]:
        """The groups of one row; empty where its rewards do not differ enough or a sequence is too long."""
        prompt = render_prompt(self.tokenizer, row)
        completions = row.get("tokens") or [answer_ids(self.tokenizer, row, c) for c in row["completions"]]
        build = {
            "single": self._single,
            "pair": self._pairs,
            "completions": self._completions,
            "revisions": self._revisions,
        }
        groups = build[self.kind](prompt, completions, row)
        groups = [g for g in groups if all(len(s.tokens) <= self.sequence_length for s in g)]
        for sequence in (s for g in groups for s in g):
            sequence.mask[np.isin(sequence.tokens, self.masked)] = 0
        return groups

    def _single(self, prompt, completions, row) -> list[Group]:
        found = [i for i, r in enumerate(row["rewards"]) if r >= self.min_reward and self._ended(completions[i])]
        if not found:
            return []
        sequence = make_sequence(prompt, completions[max(found, key=lambda i: (row["rewards"][i], -i))])
        return [[Sequence(sequence.tokens, sequence.mask)]]

    def _ended(self, completion: list[int]) -> bool:
        return completion[-1:] == [self.tokenizer.eos_token_id]

    def _completions(self, prompt, completions, row) -> list[Group]:
        if len(completions) < self.fewest or max(row["rewards"]) - min(row["rewards"]) < self.min_gap:
            return []
        best = int(np.argmax(row["rewards"]))
        logprobs = (row.get("logprobs") if self.behaviour else None) or [None] * len(completions)
        if self.behaviour and None in logprobs:
            raise CuveeError(
                f"{row['id']}: a completion has no log-probabilities of its sampling, which the objective's ratios need; "
                "sample with temperature=1 and with_answer=false, or choose an objective without ratios (copg)"
            )
        given = enumerate(zip(completions, logprobs, row["rewards"], strict=True))
        # Among completions rewarded alike none is to be imitated.
        told = max(row["rewards"]) > min(row["rewards"]) and self._ended(completions[best])
        return [[make_sequence(prompt, c, p, reward=r, sft=float(told and i == best)) for i, (c, p, r) in given]]

    def _contrasts(self, rewards: list[float]) -> list[tuple[int, int]]:
        """(better, worse), the widest gaps first: the first is the highest against the lowest reward."""
        n = range(len(rewards))
        found = [
            (w, low) for w in n for low in n if rewards[w] - rewards[low] >= self.min_gap and rewards[w] > rewards[low]
        ]
        return sorted(found, key=lambda pair: (rewards[pair[1]] - rewards[pair[0]], pair))[: self.per_prompt]

    def _pairs(self, prompt, completions, row) -> list[Group]:
        groups = []
        for w, low in self._contrasts(row["rewards"]):
            gap = row["rewards"][w] - row["rewards"][low]
            label = 1 / (1 + math.exp(-self.soft_label * gap)) if self.soft_label else 1.0
            own = {"label": label, "margin": self.margin * gap}
            groups.append([
                make_sequence(prompt, completions[w], chosen=1.0, sft=float(self._ended(completions[w])), reward=row["rewards"][w], **own),
                make_sequence(prompt, completions[low], chosen=0.0, reward=row["rewards"][low], **own),
            ])  # fmt: skip
        return groups

    def _revisions(self, prompt, completions, row) -> list[Group]:
        groups = []
        for w, low in self._contrasts(row["rewards"]):
            sides = {1.0: w, 0.0: low}
            prompts = {-1.0: prompt}
            for draft, i in sides.items():
                asked = {**row, "messages": revise(row["messages"], row["completions"][i])}
                prompts[draft] = render_prompt(self.tokenizer, asked)
            groups.append([
                make_sequence(prompts[draft], completions[i], chosen=chosen, draft=draft, reward=row["rewards"][i],
                              sft=float(chosen == 1 and draft == -1 and self._ended(completions[i])))
                for draft in (-1.0, 0.0, 1.0)
                for chosen, i in sides.items()
            ])  # fmt: skip
        return groups


def revise(messages: list[dict[str, str]], draft: str) -> list[dict[str, str]]:
    """The conversation that asks the policy to improve a draft of its own (a raw completion)."""
    from stages.chat.render import response

    return [*messages, {"role": "assistant", "content": response(draft)}, {"role": "user", "content": REVISE}]


class Groups:
    """A Stream over the groups of each prompt, all known at the start: shuffled epochs, `count` prompts a step."""

    def __init__(self, prompts: list[list[Group]], count: int, seed: int):
        self.prompts, self.count, self.seed = prompts, count, seed

    def batch(self, step: int, trainer: Any) -> list[Group]:
        chosen = epoch_slice(len(self.prompts), step * self.count, self.count, self.seed)
        return [group for i in chosen for group in self.prompts[i]]


def epoch_slice(size: int, start: int, count: int, seed: int) -> list[int]:
    """Items start .. start + count of an endless row of shuffled epochs over range(size)."""
    found: list[int] = []
    while len(found) < count:
        epoch, at = divmod(start + len(found), size)
        order = np.random.default_rng([seed, epoch]).permutation(size)
        found += order[at : at + count - len(found)].tolist()
    return found
