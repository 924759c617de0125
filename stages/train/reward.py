"""Train a reward model: Bradley-Terry on pairs of completions, one epoch unless `max_epochs` says more.

A large model memorises a completion at the second look: so the pairs of a prompt, which share completions, lie in one
optimizer step (Ouyang et al., arXiv 2203.02155, section 3.5), and an epoch passes over each prompt once.

Two stages as in Command A (arXiv 2504.00698, section 3.2.3) are two of these: the first with the input `ensemble`, which
labels many pairs; the second from the first (input `start`) on the best pairs, labelled by the strength of preference.
A ranker is one with `elo`: several raters compare, and the margin follows the gap in Elo.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.rollout._collect import read_jsonl, read_pairs
from stages.stage import Artifact, ConfigError, Context, CuveeError, Estimate, Input, Kind, option
from stages.trainer.config import TrainConfig

if TYPE_CHECKING:
    from stages.trainer.batch import Group

VERSION = "5"
INPUTS = {
    "init": Input(Kind.CHECKPOINT, optional=True),
    "start": Input(Kind.REWARD_MODEL, optional=True),
    "pairs": Input(Kind.PAIRS),
    "own": Input(Kind.PAIRS, optional=True),  # a user's, beside the sampled ones
    "ensemble": Input(Kind.REWARD_MODEL, many=True, optional=True),
    "probe": Input(Kind.PAIRS, optional=True),
}
OUTPUT = Kind.REWARD_MODEL
DISTRIBUTED = True


@dataclass
class Config(TrainConfig):
    lr: float = option(4e-5, "peak learning rate")
    steps: int = option(4000, "optimizer steps; cut to max_epochs over the prompts")
    max_epochs: int = option(1, "most passes over the prompts; small models gain by a second, large ones memorise")
    batch_groups: int = option(64, "prompts an optimizer step, each with all of its pairs")
    pairs_per_prompt: int = option(1, "pairs made of each prompt's completions, those furthest apart in reward first")
    min_gap: float = option(0.0, "least difference between the rewards of a pair")
    soft_label: float = option(0.0, "label a pair sigmoid(soft_label * reward gap) instead of 1; 0 = hard labels")
    strengths: list[Any] = option(
        [], "[[reward gap, label], ...], gaps falling: a pair of at least that gap has that label; empty = soft_label"
    )
    ties: int = option(0, "pairs of equal reward made of each prompt's completions, labelled 0.5")
    agree: bool = option(False, "with input `ensemble`: leave out pairs that it orders otherwise than the rewards do")
    elo: bool = option(
        False, "take for rewards the Elo of a prompt's completions, each reward in the samples being a rater of them"
    )
    margin: float = option(0.0, "ask for a score gap of margin * reward gap")
    centring: float = option(0.01, "weight of (r_w + r_l)^2, which keeps the scores' mean near 0")
    heldout: float = option(0.1, "share of the prompts kept for the accuracy on pairs not trained on")


def check(config: Config, inputs: dict[str, Any]) -> None:
    config.check()
    for name in ("batch_groups", "pairs_per_prompt", "max_epochs"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}: {getattr(config, name)} trains on nothing; give at least 1")
    if not 0 < config.heldout < 1:
        raise ConfigError(f"heldout: {config.heldout} is no share; give more than 0 and less than 1")
    if ("init" in inputs) == ("start" in inputs):
        raise ConfigError("give one of the inputs `init` (a language model) and `start` (a reward model), not both")
    for one in config.strengths:
        numbers = isinstance(one, list) and len(one) == 2 and all(isinstance(v, int | float) for v in one)
        if not numbers or not 0 <= one[1] <= 1:
            raise ConfigError(f"strengths: {one!r} is not [reward gap, label from 0 to 1], e.g. [1.0, 0.999]")
    if config.strengths != sorted(config.strengths, key=lambda one: -one[0]):
        raise ConfigError(f"strengths: the gaps of {config.strengths} do not fall; the largest comes first")
    for name in ("min_gap", "soft_label", "ties", "margin", "centring"):
        if getattr(config, name) < 0:
            raise ConfigError(f"{name}: {getattr(config, name)} is negative; give 0 or more")
    if config.elo and "own" in inputs:
        raise ConfigError("elo: compares several raters of the same completions, which the input `own` has not; set false")
    if config.agree and not (config.strengths and "ensemble" in inputs):
        raise ConfigError(
            "agree: compares rewards with an ensemble; give the input `ensemble`, and strengths to label by"
        )


def estimate(config: Config, inputs: dict[str, Any]) -> Estimate:
    tokens = config.steps * config.batch_groups * config.pairs_per_prompt * 2 * config.sequence_length
    return Estimate(parameters=(inputs.get("init") or inputs["start"]).parameters, train_tokens=tokens)


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Train, write the REWARD_MODEL folder and `judged.json`: quality on the held-out prompts' pairs, see
    stages/train/_judge.py, with input `probe` also what optimising against the model brings.

    Raises CuveeError when there are no pairs to train on or to hold out.
    """
    from stages.objectives import bradley_terry
    from stages.train._groups import Groups
    from stages.trainer.loop import train

    init: Path = (inputs.get("init") or inputs["start"]).path
    rows = read_pairs(inputs)
    if config.elo:
        rows = [row for row in map(_by_elo, rows) if row]
    kept, held_out = split(rows, config.heldout)
    make = Pairs(config, init)
    prompts = [groups for groups in map(make, kept) if groups]
    judged = [(row["domain"], group) for row in held_out for group in make(row) if _gap(group) > 0]
    if "ensemble" in inputs and (config.agree or not config.strengths):
        prompts = relabelled(prompts, _opinion(inputs["ensemble"], prompts, ctx), config)
    pairs = sum(map(len, prompts))
    if not prompts or not judged:
        raise CuveeError(
            f"{len(rows)} prompts give {pairs} pairs to train on and {len(judged)} to hold out within "
            f"sequence_length {config.sequence_length} and min_gap {config.min_gap}; sample more prompts or completions"
        )
    config = cut(config, len(prompts))
    ctx.log(f"{pairs} pairs of {len(prompts)} prompts to train on in {config.steps} steps, {len(judged)} held out")
    options = bradley_terry.Config(centring=config.centring)
    metrics = train(
        config=config, stream=Groups(prompts, config.batch_groups, config.seed),
        objective=lambda batch: bradley_terry.loss(batch, options), out=out, ctx=ctx, init=init, tokenizer=init,
        head="reward",
    )  # fmt: skip
    return judge(judged, inputs.get("probe"), out, ctx) | metrics | {"pairs": pairs}


def cut(config: Config, prompts: int) -> Config:
    """The configuration with `steps`, and all that is counted in steps, cut to `max_epochs` over the prompts."""
    steps = min(config.steps, max(1, config.max_epochs * prompts // config.batch_groups))
    warmup = min(config.warmup_steps, steps - 1)
    return replace(
        config, steps=steps, warmup_steps=warmup, precision_phases=_first(config.precision_phases, steps),
        profile_steps=[min(step, steps) for step in config.profile_steps],
        decay_steps=min(config.decay_steps, steps - warmup),
    )  # fmt: skip


def _by_elo(row: dict[str, Any]) -> dict[str, Any] | None:
    """The row with Elo for rewards, by the raters that judge all of its completions; None without any."""
    from stages.train._judge import elo

    raters = [part for part in row["parts"].values() if part and None not in part]
    return row | {"rewards": elo(raters)} if raters else None


class Pairs:
    """The pairs of a row of samples, in the order of their gaps, then its ties; each labelled by the strength of the
    preference. Tokens are those of `init`'s tokenizer."""

    def __init__(self, config: Config, init: Path):
        from transformers import AutoTokenizer

        from stages.train._groups import Grouper

        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(init)
        self.grouper = Grouper(
            self.tokenizer, "pair", config.sequence_length, min_gap=config.min_gap, soft_label=config.soft_label,
            margin=config.margin, per_prompt=config.pairs_per_prompt,
        )  # fmt: skip

    def __call__(self, row: dict[str, Any]) -> list["Group"]:
        groups = self.grouper(row)
        for group in groups if self.config.strengths else ():
            group[0].fields["label"] = strength(self.config.strengths, _gap(group))
        return [*groups, *self._ties(row)]

    def _ties(self, row: dict[str, Any]) -> list["Group"]:
        """Pairs of different completions that are rewarded alike: the first ones of the row."""
        from itertools import combinations

        rewards, texts = row["rewards"], row["completions"]
        alike = [(i, j) for i, j in combinations(range(len(rewards)), 2)
                 if rewards[i] == rewards[j] and texts[i] != texts[j]]  # fmt: skip
        found = []
        for i, j in alike[: self.config.ties]:
            pick = {key: [row[key][i], row[key][j]] for key in ("completions", "tokens") if row.get(key)}
            for group in self.as_pair(row | pick | {"rewards": [1.0, 0.0]}):
                for sequence in group:
                    sequence.fields.update(label=0.5, margin=0.0, reward=rewards[i])
                found.append(group)
        return found

    def as_pair(self, row: dict[str, Any]) -> list["Group"]:
        """The first completion of the row as preferred to the second; none where either is too long."""
        from stages.train._groups import Grouper

        return Grouper(self.tokenizer, "pair", self.config.sequence_length)(row)


def strength(strengths: list[list[float]], gap: float) -> float:
    """The label of the first entry whose gap is reached; 0.5, a tie, below all of them."""
    return next((label for least, label in strengths if gap >= least), 0.5)


def _gap(group: "Group") -> float:
    return group[0].fields["reward"] - group[1].fields["reward"]


def _opinion(ensemble: dict[str, Artifact], prompts: list[list["Group"]], ctx: Context) -> list[list[float]]:
    """Of each pair the ensemble's probability that its first completion is the better: the mean of its members'."""
    import math

    from stages.rewards.reward_model import Scorer

    pairs = [group for groups in prompts for group in groups]
    unique = {s.tokens.tobytes(): s.tokens.tolist() for pair in pairs for s in pair}
    total = [0.0] * len(pairs)
    for member in ensemble.values():
        score = dict(zip(unique, Scorer(member.path, ctx)(list(unique.values())), strict=True))
        for i, (first, second) in enumerate(pairs):
            margin = score[first.tokens.tobytes()] - score[second.tokens.tobytes()]
            total[i] += 0.5 * (1 + math.tanh(margin / 2)) / len(ensemble)  # the sigmoid, without overflow
    rest = iter(total)
    return [[next(rest) for _ in groups] for groups in prompts]


def relabelled(prompts: list[list["Group"]], opinion: list[list[float]], config: Config) -> list[list["Group"]]:
    """The pairs with the ensemble's labels; with `strengths` with their own, and with `agree` without those on which the
    ensemble is of the other opinion. Prompts without a pair are left out."""
    found = []
    for groups, labels in zip(prompts, opinion, strict=True):
        if not config.strengths:
            for group, label in zip(groups, labels, strict=True):
                group[0].fields["label"] = label
        elif config.agree:
            groups = [g for g, label in zip(groups, labels, strict=True) if label > 0.5 or _gap(g) == 0]
        found += [groups] if groups else []
    return found


def _first(phases: list[list[Any]], steps: int) -> list[list[Any]]:
    """The part of [[precision, steps], ...] that the first `steps` take."""
    found = []
    for name, count in phases:
        if steps > 0:
            found.append([name, min(count, steps)])
        steps -= count
    return found


def split(rows: list[dict], share: float) -> tuple[list[dict], list[dict]]:
    """(to train on, held out) by the hash of the prompt's domain and id: every reward model holds out the same ones, so
    that what an ensemble has learned never comes from another's held-out prompts."""
    from hashlib import sha256

    digests = {(row["domain"], row["id"]): sha256(f"{row['domain']}/{row['id']}".encode()).digest() for row in rows}
    chosen = {p for p, digest in digests.items() if int.from_bytes(digest[:6], "big") < share * 2**48}
    chosen = chosen or {min(digests, key=lambda p: digests[p])}
    sides: tuple[list[dict], list[dict]] = ([], [])
    for row in rows:
        sides[(row["domain"], row["id"]) in chosen].append(row)
    return sides


def judge(pairs: list, probe: Artifact | None, model: Path, ctx: Context) -> dict[str, float]:
    """Judge (domain, pair)s that were not trained on, and the probe's completions; writes `judged.json` to the model's
    folder and returns its main figures as metrics."""
    import json

    from stages.rewards.reward_model import Reward, Scorer
    from stages.train._judge import optimised, quality

    scores = Scorer(model, ctx)([s.tokens.tolist() for _, pair in pairs for s in pair])
    margins = [w - low for w, low in zip(scores[0::2], scores[1::2], strict=True)]
    found = quality([domain for domain, _ in pairs], margins)
    if probe:
        rows = read_jsonl(probe.path / "samples.jsonl")
        tokens = [row["tokens"] for row in rows] if all(row.get("tokens") for row in rows) else None
        proxy = Reward(ctx, model)(rows, [row["completions"] for row in rows], tokens)
        found["optimised"] = optimised(proxy, [row["rewards"] for row in rows])
        for one in found["optimised"]:
            ctx.log(f"best of {one['n']}: KL {one['kl']:.2f} nats, proxy {one['proxy']:+.2f}, gold {one['gold']:.3f}")
    (model / "judged.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    metrics = {"heldout_accuracy": found["accuracy"], "heldout_gap": found["margin"], "heldout_ece": found["ece"],
               "heldout_pairs": found["pairs"]}  # fmt: skip
    metrics |= {f"heldout_accuracy/{d}": share for d, share in found["domains"].items()}
    return metrics | {f"best_of_{one['n']}/gold": one["gold"] for one in found.get("optimised", [])}
