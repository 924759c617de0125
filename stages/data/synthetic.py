"""Conversations that teachers write: each prompt is answered by a pool of models, and the best answer is kept.

Data arbitrage as in Aya Expanse (arXiv 2412.04261, section 2.1): pools by domain or language, the best of a prompt's answers
by the rewards of stages/rewards, or among those that they accept by a judge.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.chat.messages import said
from stages.chat.render import SPECIAL, VARIABLES
from stages.rewards._common import refuse_idle
from stages.rollout._collect import check_mix, load_prompts, schedule
from stages.stage import (
    Artifact,
    ConfigError,
    Context,
    CuveeError,
    Estimate,
    Input,
    Kind,
    identity,
    names,
    option,
    placement,
    resolve,
    unknown,
)
from stages.teacher.client import Client, Request, Teacher, client_of, teachers, totals
from stages.teacher.judge import grade

VERSION = "3"
INPUTS = {"prompts": Input(Kind.PROMPTS, many=True), "reward": Input(Kind.REWARD_MODEL, optional=True)}
OUTPUT = Kind.CONVERSATIONS


@dataclass
class Config:
    teachers: dict[str, Any] = placement(
        {}, "name: {model, url, key, prices, limits, ...}, see Teacher in stages/teacher/client.py"
    )
    pools: dict[str, Any] = option(
        {}, "domain: [names of the teachers that answer its prompts]; a domain that is not named asks all"
    )
    prompts: int = option(1000, "prompts answered, drawn by `mix`")
    mix: dict[str, float] = option({}, "share of each domain's prompts; empty takes all domains equally")
    completions: int = option(1, "answers of each teacher to a prompt")
    rewards: dict[str, float] = option({}, "weight of each reward of stages/rewards; empty takes the verifier alone")
    min_reward: float = option(0.5, "answers that are rewarded less are left out; the verifier gives 1 to a right one")
    judge: str = option(
        "", "teacher that grades the answers left, of which the best is kept; empty keeps the highest reward"
    )
    seed: int = option(0, "seed of the choice of prompts, sent along with the requests")
    cache: str = placement(
        "", "folder that keeps the answers for other runs too; empty keeps them until this stage is done"
    )
    budget: float = placement(0.0, "most to spend, in the currency of the prices; 0 = no limit")
    dry_run: bool = placement(False, "count requests, tokens and cost, send nothing and stop")


def check(config: Config, inputs: dict[str, Any]) -> None:
    """Raises ConfigError for teachers, pools, a judge or rewards that are not known, and a share of no domain."""
    found = _teachers(config)
    if not found:
        raise ConfigError(
            "teachers: is empty; give at least one, e.g. {own: {model: polished, url: http://127.0.0.1:8000/v1}}"
        )
    for domain, pool in config.pools.items():
        if domain not in inputs["prompts"]:
            raise ConfigError(f"pools: {unknown(domain, sorted(inputs['prompts']))}")
        for name in pool:
            if name not in found:
                raise ConfigError(f"pools.{domain}: {unknown(str(name), sorted(found))}")
    if config.judge and config.judge not in found:
        raise ConfigError(f"judge: {unknown(config.judge, sorted(found))}")
    for name in config.rewards:
        if name not in names("rewards"):
            raise ConfigError(f"rewards: {unknown(name, names('rewards'))}")
    if config.rewards.get("reward_model") and "reward" not in inputs:
        raise ConfigError("rewards: reward_model has a weight, but the stage has no input `reward`; give it one")
    check_mix(config.mix, inputs)
    if config.prompts < 1 or config.completions < 1:
        raise ConfigError(f"prompts is {config.prompts}, completions {config.completions}; give at least 1 of each")


def external(config: Config) -> dict[str, Any]:
    """What of the teachers decides their answers: the model and how it is sampled, not where it runs or what it costs."""
    return {"teachers": {name: identity(teacher) for name, teacher in _teachers(config).items()}}


def estimate(config: Config, inputs: dict[str, Any]) -> Estimate:
    """As if every prompt were of the domain that asks the most teachers, and the judge graded every answer."""
    answers = config.completions * max(len(_pool(config, domain)) for domain in inputs["prompts"])
    return Estimate(requests=config.prompts * answers * (2 if config.judge else 1))


def run(config: Config, inputs: dict[str, Artifact], out: Path, ctx: Context) -> dict[str, float]:
    """Writes train.jsonl (id, messages with the best answer, its teacher), candidates.jsonl (every answer with its teacher,
    finish and reward, a prompt a line) and usage.json. Raises CuveeError for a dry run, with its counts, and when no answer
    is good enough."""
    prompts = load_prompts(inputs["prompts"], config.mix)
    drawn = schedule({d: len(rows) for d, rows in prompts.items()}, config.mix, config.prompts, config.seed)
    rows = [prompts[domain][i] for domain, i in dict.fromkeys(drawn)]
    asked = [_requests(config, row) for row in rows]
    requests = [request for row in asked for request in row]
    client = client_of(config, _teachers(config), requests, "data.synthetic", ctx, " before judging" if config.judge else "")
    answers = iter(client.complete(requests))
    candidates = [
        _candidate(row, [(request.teacher, next(answers)) for request in own])
        for row, own in zip(rows, asked, strict=True)
    ]
    _reward(config, inputs, candidates, ctx)
    _choose(config, client, candidates)
    kept = [c for c in candidates if c["chosen"] is not None]
    made = [answer for c in candidates for answer in c["answers"]]
    whole, cut = sum(map(_whole, made)), sum(answer["finish"] == "length" for answer in made)
    if cut:
        ctx.log(f"{cut} of {len(made)} answers were cut off at their teacher's max_tokens and are left out")
    if not whole:
        others = ", the others are empty or hold special tokens" if cut < len(made) else ""
        raise CuveeError(f"data.synthetic.teachers: none of {len(made)} answers to {len(candidates)} prompts is whole: {cut} do not end within "
                         f"max_tokens ({_limits(client)}){others}; raise max_tokens, or ask teachers that end their turns: a base model "
                         "does not")  # fmt: skip
    if not kept:
        raise CuveeError(f"data.synthetic.min_reward: of {len(made)} answers to {len(candidates)} prompts {whole} are whole (the others cut "
                         f"off or empty), and none of these is rewarded {config.min_reward} or more; lower it, raise max_tokens or ask "
                         "better teachers")  # fmt: skip
    _write(out / "candidates.jsonl", candidates)
    _write(out / "train.jsonl", map(_conversation, kept))
    (out / "usage.json").write_text(json.dumps({name: asdict(u) for name, u in client.usage.items()}, indent=1) + "\n")
    used, chosen = totals(client.usage), Counter(c["answers"][c["chosen"]]["teacher"] for c in kept)
    ctx.log(
        f"{len(kept)} of {len(candidates)} prompts answered: "
        + ", ".join(f"{n} by {name}" for name, n in chosen.most_common())
    )
    mean = sum(c["answers"][c["chosen"]]["reward"] for c in kept) / len(kept)
    return {"conversations": len(kept), "prompts": len(candidates), "reward": mean, "cut_off": cut / len(made), **used,
            **{f"chosen/{name}": chosen[name] / len(kept) for name in client.teachers}}  # fmt: skip


def _teachers(config: Config) -> dict[str, Teacher]:
    return teachers(config.teachers, "teachers")


def _pool(config: Config, domain: str) -> list[str]:
    others = [name for name in config.teachers if name != config.judge or len(config.teachers) == 1]
    return config.pools.get(domain) or others


def _requests(config: Config, row: dict[str, Any]) -> list[Request]:
    own = {name: row[name] for name in ("documents", "safety_mode") if name in row}  # as `cuvee serve` takes them
    return [Request(name, row["messages"], seed=config.seed * 1000 + i, tools=row.get("tools"), options=own)
            for name in _pool(config, row["domain"]) for i in range(config.completions)]  # fmt: skip


def _candidate(row: dict[str, Any], answers: list[tuple[str, Any]]) -> dict[str, Any]:
    return {
        **row,
        "answers": [{"teacher": name, "message": a.message, "finish": a.finish, "reward": 0.0} for name, a in answers],
    }


def _whole(answer: dict[str, Any]) -> bool:
    """Ended by the teacher, and without special tokens of ours, which no text to train on may hold."""
    ended = answer["message"] is not None and answer["finish"] in ("stop", "tool_calls")
    return ended and not SPECIAL.search(said(answer["message"]))


def _limits(client: Client) -> str:
    return ", ".join(f"{name}: {teacher.max_tokens}" for name, teacher in client.teachers.items())


def _reward(config: Config, inputs: dict[str, Artifact], candidates: list[dict[str, Any]], ctx: Context) -> None:
    """Set the weighted reward of every whole answer; a reward that says nothing of a prompt is left out of the sum."""
    weights = config.rewards or {"verifier": 1.0}
    refuse_idle(sorted(weights), candidates)
    model = inputs["reward"].path if "reward" in inputs else None
    whole = [[a for a in c["answers"] if _whole(a)] for c in candidates]
    texts = [[said(a["message"]) for a in row] for row in whole]
    for name, weight in sorted(weights.items()):
        reward = resolve("rewards", name).Reward(ctx, model if name == "reward_model" else None)
        if hasattr(reward, "of_tokens"):
            raise CuveeError(
                f"data.synthetic.rewards: {name} looks at tokens, and teachers answer with texts; take it out"
            )
        for row, values in zip(whole, reward(candidates, texts), strict=True):
            for answer, value in zip(row, values, strict=True):
                answer["reward"] += weight * float(value or 0.0)


def _choose(config: Config, client: Client, candidates: list[dict[str, Any]]) -> None:
    """Set `chosen`, the place of the best answer; None where none is whole and good enough. Of equals the first is taken."""
    good = [
        [i for i, a in enumerate(c["answers"]) if _whole(a) and a["reward"] >= config.min_reward] for c in candidates
    ]
    if config.judge:
        open_ = [(c, places) for c, places in zip(candidates, good, strict=True) if len(places) > 1]
        texts = [[said(c["answers"][i]["message"]) for i in places] for c, places in open_]
        for (c, places), points in zip(open_, grade(client, config.judge, [c for c, _ in open_], texts), strict=True):
            for i, value in zip(places, points, strict=True):
                c["answers"][i]["grade"] = value
    for c, places in zip(candidates, good, strict=True):
        c["chosen"] = max(
            places, key=lambda i: (c["answers"][i].get("grade", 0.0), c["answers"][i]["reward"]), default=None
        )


def _conversation(candidate: dict[str, Any]) -> dict[str, Any]:
    best = candidate["answers"][candidate["chosen"]]
    own = {name: candidate[name] for name in VARIABLES if name in candidate}
    return {
        "id": candidate["id"],
        "messages": [*candidate["messages"], best["message"]],
        **own,
        "teacher": best["teacher"],
    }


def _write(path: Path, rows: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
