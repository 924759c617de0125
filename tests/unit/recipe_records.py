"""The records and scores of a whole recipe, drawn from a seed, as the flow would hand them to the report."""

from __future__ import annotations

import hashlib
import json
import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

from stages.evaluation._suites import by
from stages.evaluation.evaluate import summary
from stages.stage import Artifact, Kind
from stages.train._judge import optimised, quality

DOMAINS = ("code", "long_context", "math", "multilingual", "rag", "safety")
START = datetime(2026, 1, 5, 9, 30, tzinfo=UTC)
# What each step of the recipe does to the chance of solving a prompt: (all domains, the expert's own domain).
SKILL = {"pretrained": 0.0, "base": 0.01, "instruct": 0.28, "sft-soup": 0.47, "rl-soup": 0.58, "best-of-n": 0.60,
         "preference": 0.62, "online": 0.66, "polished": 0.66}  # fmt: skip


class Recipe:
    """Adds artifacts one by one, as flows/command_a.py does, and remembers their records."""

    def __init__(self, root: Path, domains: tuple[str, ...] = DOMAINS, prompts: int = 40) -> None:
        self.root, self.domains, self.prompts = root, domains, prompts
        self.random = random.Random(0)
        self.records: dict[str, dict] = {}
        self.clock = START
        self.made: dict[str, Artifact] = {}

    def step(self, name, stage, kind, seconds, metrics=None, series=None, config=None, threads=1, **inputs):
        fingerprint = hashlib.sha256(name.encode()).hexdigest()[:32]
        link = lambda one: {"fingerprint": one.fingerprint, "kind": one.kind.value}  # noqa: E731
        started, self.clock = self.clock, self.clock + timedelta(seconds=seconds * 0.55)
        record = {
            "name": name, "stage": stage, "fingerprint": fingerprint, "kind": kind.value, "config": config or {},
            "version": "1", "metrics": metrics or {}, "series": series or {}, "threads": threads, "estimate": {},
            "inputs": {a: {k: link(v) for k, v in one.items()} if isinstance(one, dict) else link(one)
                       for a, one in inputs.items()},
            "started": started.isoformat(timespec="milliseconds"), "seconds": seconds, "files": {},
            "ended": (started + timedelta(seconds=seconds)).isoformat(timespec="milliseconds"),
            "environment": {"python": "3.11.2", "machine": "x86_64", "torch": "2.13.0", "cuvee": "0.1.0",
                            "commit": "0123456789ab"},
        }  # fmt: skip
        self.records[fingerprint] = {k: v for k, v in record.items() if k != "files"}
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        self.made[name] = Artifact(folder, kind, fingerprint, record | {"ancestors": self.records})
        return self.made[name]

    def train(self, name, stage, seconds, trained, start, end, kind=Kind.CHECKPOINT, reward=None, threads=1, **inputs):
        steps, noise = 120, self.random
        curve = [[s + 1, end + (start - end) * math.exp(-4 * s / steps) + noise.gauss(0, 0.03)] for s in range(steps)]
        series = {"loss": curve, "grad_norm": [[s, 1.0] for s, _ in curve]}
        if reward:
            a, b = reward
            series["reward"] = [[s, b + (a - b) * math.exp(-3 * s / steps) + noise.gauss(0, 0.05)] for s, _ in curve]
        metrics = {"loss": curve[-1][1], "heldout_accuracy": 0.83, "tokens": trained, "parameters": 1_311_872}
        config = {"steps": steps, "lr": 1e-3, "sequence_length": 256, "schedule": "wsd", "seed": 0, "rewards": {}}
        return self.step(name, stage, kind, seconds, metrics, series, config, threads, **inputs)

    def soup(self, name, models, base):
        keys = sorted(models)
        metrics = {"parameters": 1_311_872, **{f"change/{k}": self.random.uniform(0.1, 0.3) for k in [*keys, "soup"]}}
        metrics |= {f"cosine/{a}/{b}": self.random.uniform(0.1, 0.5) for i, a in enumerate(keys) for b in keys[i + 1 :]}
        config = {"method": "linear", "weights": {}, "options": {}, "seed": 0}
        return self.step(name, "merge.soup", Kind.CHECKPOINT, 0.6, metrics, config=config, models=models, base=base)

    def scores(self, model, skill, prompts, reward):
        made = self.step(f"scores-{model.record['name']}", "evaluation.evaluate", Kind.SCORES, self.random.uniform(3, 5),
                         model=model, prompts=prompts, **({"reward": reward} if reward else {}))  # fmt: skip
        rows = []
        for d, domain in enumerate(self.domains):
            for i in range(self.prompts):
                length = (1000, 2000, 4000)[i % 3] if domain == "long_context" else None
                hardness = random.Random(f"{domain}{i}").random()
                chance = min(
                    0.97, max(0.0, skill(domain) - 0.03 * d - (0.12 * math.log2(length / 1000) if length else 0))
                )
                solved = hardness * 0.7 + self.random.random() * 0.3 < chance
                reward_value = 1.0 if solved else self.random.choice([-1.0, 0.0, 0.25, 0.5] if chance > 0.1 else [-1.0])
                rows.append({
                    "id": f"{domain}-{i}", "domain": domain, "prompt": f"What is the {domain} question number {i}?",
                    "answer": f"the answer <{i}>", "completion": f"the answer <{i}>" if solved else "something else",
                    "reward": reward_value, "score": max(reward_value, 0.0), "length": length, "tokens": 12 + i % 9,
                    "ended": solved or chance > 0.1, **({"reward_model": reward_value + self.random.gauss(0, 0.8)} if reward else {}),
                })  # fmt: skip
        bits = {"code": 2.4, "names": 3.1, "prose": 2.7}
        found = {
            "digests": {"tokenizer": "a" * 64, "template": "b" * 64, "prompts": {d: "c" * 64 for d in self.domains}},
            "engine": {"engine": "transformers", "max_new_tokens": 64, "prompts_per_domain": 40, "temperature": 0.0},
            "domains": {domain: summary(some) for domain, some in by(rows, "domain").items()},
            "lengths": {d: {str(n): summary(s) for n, s in by(some, "length").items()}
                        for d, some in by(rows, "domain").items() if d == "long_context"},
            "perplexity": {d: {"bits_per_byte": b - 0.4 * skill("code"), "nats_per_token": 2.1 * b / 2.4, "tokens": 20000,
                               "bytes": 61000, "perplexity": math.exp(2.1)} for d, b in bits.items()},
        }  # fmt: skip
        (made.path / "scores.json").write_text(json.dumps(found, sort_keys=True))
        (made.path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return made


def corpus_table() -> dict:
    """table.json as curation writes it."""
    names = ("source", "domain", "language", "outcome", "rule", "documents", "bytes")
    rows = [
        ("cldr", "names", "de", "train", "", 120, 190_000), ("cldr", "names", "ja", "train", "", 118, 240_000),
        ("cldr", "names", "de", "heldout", "", 6, 9_000), ("cldr", "names", "ja", "exact", "same text as", 3, 4_000),
        ("stdlib", "code", "", "train", "", 1_540, 9_800_000), ("stdlib", "code", "", "heldout", "", 81, 520_000),
        ("stdlib", "code", "", "quality", "mostly punctuation", 212, 900_000), ("stdlib", "code", "", "minhash", "near", 96, 700_000),
        ("stdlib", "prose", "en", "train", "", 1_990, 3_100_000), ("stdlib", "prose", "en", "heldout", "", 104, 170_000),
        ("stdlib", "prose", "en", "language", "not sure of the language", 300, 41_000),
        ("stdlib", "prose", "en", "quality", "fewer than 20 words", 270, 22_000),
    ]  # fmt: skip
    blocks = [
        ("read", 0, 4840),
        ("language", 300, 4540),
        ("quality", 482, 4058),
        ("exact", 3, 4055),
        ("minhash", 96, 3959),
    ]
    example = {
        "id": "stdlib/lib2to3/fixer.py",
        "reason": "near: stdlib/lib2to3/other.py (0.91)",
        "text": "def <fix>(self):\n    pass",
    }
    return {
        "blocks": [{"block": b, "removed": gone, "kept": kept, "changed": gone // 2, "bytes": kept * 3_300} for b, gone, kept in blocks],
        "rows": [dict(zip(names, row, strict=True)) for row in rows],
        "removed_examples": {"minhash": [example], "quality": [example | {"reason": "mostly punctuation: 0.61"}]},
        "changed_examples": {"language": [{"id": "cldr/de/days", "before": "Ã©", "after": "é"}]},
        "thresholds": [{"block": "quality", "option": "min_words", "threshold": 50, "documents": 96, "removed": [[38, 4], [45, 5], [50, 6], [55, 6], [62, 9]],
                        "nearest": [{"value": 45, "id": "stdlib/uu.py", "reason": "number of words: 47", "text": "<uu>"}]}],
    }


def whole(root: Path, domains: tuple[str, ...] = DOMAINS, judged: bool = True) -> dict:
    """The report's inputs after a whole run of the recipe."""
    r = Recipe(root, domains)
    corpus = r.step("corpus", "data.curate", Kind.CORPUS, 14.2, {"documents": 4213, "removed": 911})
    (corpus.path / "table.json").write_text(json.dumps(corpus_table()))
    prompts = {d: r.step(f"prompts-{d}", "data.prompts", Kind.PROMPTS, 1.1, corpus=corpus) for d in domains}
    tokenizer = r.step("tokenizer", "data.tokenizer", Kind.TOKENIZER, 3.0, corpus=corpus, prompts=prompts)
    tokens = r.step(
        "tokens", "data.tokens", Kind.TOKENS, 4.0, {"tokens": 3_900_000}, corpus=corpus, tokenizer=tokenizer
    )
    pretrained = r.train("pretrained", "train.pretrain", 118, 2_400_000, 8.3, 3.1, threads=2, tokens=tokens)
    base = r.train("base", "train.pretrain", 41, 600_000, 3.1, 2.8, threads=2, tokens=tokens, init=pretrained)
    instruct = r.train("instruct", "train.sft", 31, 420_000, 2.9, 0.9, threads=2, init=base, prompts=prompts)
    pairs = r.step("reward-pairs", "rollout.sample", Kind.PAIRS, 9.0, policy=instruct, prompts=prompts)
    reward = r.train("reward", "train.reward", 8, 90_000, 0.69, 0.31, Kind.REWARD_MODEL, init=instruct, pairs=pairs)
    made = {"pretrained": pretrained, "base": base, "instruct": instruct}

    def experts(kind: str, parent, stage: str):
        start, end = (0.9, 0.5) if kind == "sft" else (0.4, 0.3)
        more = {"reward": (0.3, 0.7)} if kind == "rl" else {}
        return {d: r.train(f"{kind}-{d}", stage, 14, 110_000, start, end, init=parent, prompts=prompts, **more)
                for d in domains}  # fmt: skip

    for kind, parent, stage in (("sft", "instruct", "train.sft"), ("rl", "sft-soup", "train.rl")):
        found = experts(kind, made[parent], stage)
        made |= {f"{kind}-{d}": model for d, model in found.items()}
        made[f"{kind}-soup"] = r.soup(f"{kind}-soup", found, made[parent])
    best = r.step(
        "best-of-n-samples", "rollout.sample", Kind.PAIRS, 8, policy=made["rl-soup"], prompts=prompts, reward=reward
    )
    made["best-of-n"] = r.train("best-of-n", "train.sft", 9, 80_000, 0.5, 0.4, init=made["rl-soup"], pairs=best)
    better = r.step(
        "preference-pairs", "rollout.sample", Kind.PAIRS, 8, policy=made["best-of-n"], prompts=prompts, reward=reward
    )
    made["preference"] = r.train(
        "preference", "train.preference", 9, 70_000, 0.69, 0.5, init=made["best-of-n"], pairs=better
    )
    made["online"] = r.train("online", "train.rl", 16, 60_000, 0.4, 0.3, reward=(0.5, 0.75), init=made["preference"],
                             prompts=prompts, rewarded=reward)  # fmt: skip
    candidates = {name: made[name] for name in ("best-of-n", "online", "preference")}
    wins = {f"chosen/{name}": float(name == "online") for name in ("start", *candidates)}
    made["polished"] = r.step("polished", "evaluation.choose", Kind.CHECKPOINT, 5, wins, models=candidates,
                              prompts=prompts, reward=reward, start=made["rl-soup"])  # fmt: skip

    def skill(name: str):
        kind, _, own = name.partition("-")
        if name in SKILL:
            return lambda domain: SKILL[name]
        parent = SKILL["instruct" if kind == "sft" else "sft-soup"]
        return lambda domain: parent + (0.26 if domain == own else -0.02)

    scores = {name: r.scores(model, skill(name), prompts, reward if judged else None) for name, model in made.items()}
    export = r.step("export", "export.huggingface", Kind.EXPORT, 2.0, {"max_abs_difference": 1.9e-6, "longest": 387.0, "threshold": 1e-4, "sliding_window": 128.0},
                    model=made["polished"])  # fmt: skip
    (export.path / "parity.json").write_text(
        json.dumps({"max_abs_difference": 1.9e-6, "longest": 387.0, "threshold": 1e-4, "sliding_window": 128.0})
    )
    rng = random.Random(1)
    margins = [rng.gauss(0.9, 1.2) for _ in range(200)]
    gold = [[float(rng.random() < 0.4) for _ in range(16)] for _ in range(50)]
    proxy = [[g + rng.gauss(0, 0.7) for g in row] for row in gold]
    judged = quality([domains[i % len(domains)] for i in range(200)], margins) | {"optimised": optimised(proxy, gold)}
    (reward.path / "judged.json").write_text(json.dumps(judged))
    return {"scores": scores, "export": export, "corpus": corpus, "reward": reward}
