"""The choice at the end of a polishing round, the bootstrap, and what the report says that a recipe has shown."""

import json
import math
import random
import shutil

import numpy as np
import pytest
import recipe_records
import tiny
import torch

from stages.evaluation import choose, evaluate
from stages.evaluation.stats import bootstrap
from stages.report.claims import claims
from stages.report.facts import collect
from stages.stage import ConfigError, CuveeError, Kind


def row(domain: str, score: float, reward: float) -> dict:
    return {"domain": domain, "score": score, "reward_model": reward}


def test_a_candidate_is_compared_prompt_by_prompt():
    start = [row("a", 1.0, 0.0), row("a", 0.0, 0.0), row("b", 1.0, 0.0), row("b", 1.0, 0.0), row("b", 1.0, 0.0)]
    rows = [row("a", 1.0, 1.0), row("a", 1.0, 1.0), row("b", 0.0, 0.0), row("b", 0.0, -1.0), row("b", 1.0, 0.0)]
    found = choose.compare(rows, start)
    assert found["win"][0] == (2 + 2 * 0.5) / 5 and found["fallen"] == "b"
    assert found["fall"] == pytest.approx(2 / 3 - np.std([1, 1, 0], ddof=1) / math.sqrt(3))


@pytest.mark.parametrize("candidates, chosen", [
    ({"a": (0.6, 0.0), "b": (0.7, 0.0)}, "b"),
    ({"a": (0.6, 0.0), "b": (0.9, 0.05)}, "a"),  # wins most, but a domain falls by five points
    ({"a": (0.5, 0.0), "b": (0.4, -0.1)}, "start"),  # not preferred
    ({"b": (0.6, 0.0), "a": (0.6, 0.0)}, "a"),
])  # fmt: skip
def test_the_most_preferred_within_the_limits_is_chosen(candidates, chosen):
    found = {name: {"win": [win, 0.0, 1.0], "fall": fall} for name, (win, fall) in candidates.items()}
    assert choose.choose(found, 0.5, 0.02) == chosen


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A start, a copy of it, and another model that the reward model prefers or not."""
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("choose")
    start = tiny.checkpoint(root / "start")
    tiny.checkpoint(root / "other", seed=3)
    shutil.copytree(start, root / "same")
    reward = shutil.copytree(start, root / "reward")
    save_file(load_file(start / "model.safetensors") | {"score.weight": torch.randn(1, 16)}, reward / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    rows = [{"id": f"m{i}", "domain": "math", "messages": [{"role": "user", "content": f"{i}?"}], "answer": str(i),
             "check": {"number": i}} for i in range(12)]  # fmt: skip
    tiny.jsonl(root / "prompts/heldout.jsonl", rows)
    made = {name: tiny.artifact(root / name, Kind.CHECKPOINT) for name in ("start", "same", "other")}
    return {"start": made["start"], "models": {"same": made["same"], "other": made["other"]},
            "prompts": {"math": tiny.artifact(root / "prompts", Kind.PROMPTS)},
            "reward": tiny.artifact(reward, Kind.REWARD_MODEL)}  # fmt: skip


def run(inputs, out, **values):
    out.mkdir()
    config = choose.Config(**{"max_new_tokens": 8, "prompts_per_domain": 6, "skip": 4, "most_fall": 1.0} | values)
    return choose.run(config, inputs, out, tiny.context(out.with_name("scratch"))), out


def test_the_chosen_model_is_published_as_it_is(inputs, tmp_path):
    metrics, out = run(inputs, tmp_path / "out")
    choice = json.loads((out / "choice.json").read_text())
    assert choice["prompts"] == 6 and choice["candidates"]["same"]["win"][0] == metrics["win/same"] == 0.5
    better = metrics["win/other"] > 0.5
    assert choice["chosen"] == ("other" if better else "start")
    assert next(iter(metrics)) == f"chosen/{choice['chosen']}"
    assert {name for name, value in metrics.items() if name.startswith("chosen/") and value} == {f"chosen/{choice['chosen']}"}
    source = inputs["models"]["other"].path if better else inputs["start"].path
    assert {p.name: p.read_bytes() for p in source.iterdir()} == {
        p.name: p.read_bytes() for p in out.iterdir() if p.name != "choice.json"
    }


def test_without_a_better_model_the_start_is_published(inputs, tmp_path):
    metrics, out = run(inputs | {"models": {"same": inputs["models"]["same"]}}, tmp_path / "out")
    assert metrics["chosen/start"] == 1.0
    assert (out / "model.safetensors").read_bytes() == (inputs["start"].path / "model.safetensors").read_bytes()


def test_prompts_of_the_report_are_not_used(inputs, tmp_path):
    with pytest.raises(CuveeError, match="no prompt after the first 12"):
        run(inputs, tmp_path / "out", skip=12)
    from stages.data import prompts

    with pytest.raises(ConfigError, match="skip: 200 leaves none of the 60 held-out prompts of math"):
        choose.check(choose.Config(skip=200), {"prompts": {"math": prompts.Config(heldout=60)}})


def test_sampled_rewards_are_means_over_the_samples(inputs, tmp_path):
    config = evaluate.Config(max_new_tokens=6, prompts_per_domain=3, dtype="float32", samples=4)
    (tmp_path / "out").mkdir()
    given = {"model": inputs["models"]["other"], "prompts": inputs["prompts"]}
    evaluate.run(config, given, tmp_path / "out", tiny.context(tmp_path / "scratch"))
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert all(-0.5 <= one["reward_sampled"] <= 1.0 and (one["reward_sampled"] * 8).is_integer() for one in rows)
    scores = json.loads((tmp_path / "out/scores.json").read_text())["domains"]["math"]
    assert scores["reward_sampled"] == pytest.approx(np.mean([one["reward_sampled"] for one in rows]))


def test_the_bootstrap_has_the_normal_interval_of_many_values_and_covers():
    values = np.random.default_rng(0).normal(0.1, 1.0, 1000)
    mean, low, high = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(1000)
    assert mean == pytest.approx(values.mean()) and (low, high) == pytest.approx((mean - half, mean + half), abs=0.01)
    assert bootstrap(values) == (mean, low, high) != bootstrap(values, seed=1)
    draw, covered = random.Random(2), 0
    for i in range(300):
        _, low, high = bootstrap([draw.choice([-1.0, 0.0, 0.0, 1.0, 1.0]) for _ in range(60)], seed=i, draws=1000)
        covered += low <= 0.2 <= high
    assert 0.9 <= covered / 300 <= 0.99


def test_claims_are_about_own_domains_and_rewards(tmp_path):
    made = recipe_records.whole(tmp_path / "store")
    facts = collect(made["scores"], [made["export"]])
    found = {(one["claim"], one["on"]): one for one in claims(facts)}
    assert len(found) == 6 + 6 + 1 + 6
    sft = found["sft-math above instruct", "math"]
    ours, theirs = facts.models["sft-math"], facts.models["instruct"]
    gain = ours.score("math")[0] - theirs.score("math")[0]
    assert sft["value"] == pytest.approx(gain) and sft["measure"] == "score" and sft["shown"] == (sft["low"] > 0)
    rl = found["rl-math above sft-soup", "math"]
    means = [facts.models[name].scores["domains"]["math"]["reward"] for name in ("rl-math", "sft-soup")]
    assert rl["value"] == pytest.approx(means[0] - means[1]) and rl["measure"] == "reward" and rl["seed"] == 0
    win = found["polished preferred to rl-soup", "all domains"]
    assert 0 < win["low"] < win["value"] < win["high"] < 1 and win["shown"] == (win["value"] >= 0.6)
    fall = found["polished not below rl-soup", "code"]
    assert fall["shown"] == (fall["value"] >= -0.02)


def test_an_rl_expert_is_judged_by_the_reward_it_was_trained_with(tmp_path):
    made = recipe_records.whole(tmp_path / "store")
    for artifact in made["scores"].values():
        for record in artifact.record["ancestors"].values():
            if record["name"] == "rl-code":
                record["config"]["rewards"] = {"verifier": 0.5, "reward_model": 2.0, "citation": 0.5}
    facts = collect(made["scores"], [made["export"]])
    found = next(one for one in claims(facts) if one["claim"].startswith("rl-code"))
    mean = {}
    for name in ("rl-code", "sft-soup"):
        rows = [one for one in facts.models[name].samples.values() if one["domain"] == "code"]
        mean[name] = np.mean([0.5 * one["reward"] + 2 * one["reward_model"] for one in rows])
    assert found["value"] == pytest.approx(mean["rl-code"] - mean["sft-soup"])
    assert found["measure"] == "reward without citation"  # which no evaluation holds


def suite(folder, name="math", digest="", **config):
    folder.mkdir(exist_ok=True)
    external = {"own.jsonl": digest} if digest else {}
    return tiny.artifact(folder, Kind.PROMPTS, config={"domain": name, "heldout": 6, **config}, external=external)


@pytest.mark.parametrize("config, told, why", [
    ({"domain": "math"}, {"suites": [], "heldout": False}, ""),  # made of numbers, quotes nothing
    ({"domain": "rag"}, {"suites": [], "heldout": True}, ""),
    ({"domain": "rag"}, {"suites": [], "heldout": False}, "its prompts quote held-out documents"),
    ({"domain": "rag", "heldout": 0}, {"suites": [], "heldout": False}, ""),
    ({"heldout_files": ["own.jsonl"]}, {"suites": [{"digest": "abc"}], "heldout": True}, ""),
    ({"heldout_files": ["own.jsonl"]}, {"suites": [{"digest": "other"}], "heldout": True}, "own.jsonl is not among"),
    ({"domain": "math"}, None, "does not say"),
])  # fmt: skip
def test_a_suite_that_curation_did_not_keep_out_is_known(tmp_path, config, told, why):
    from stages.evaluation._suites import contamination

    (tmp_path / "corpus").mkdir()
    if told:
        (tmp_path / "corpus/decontaminated.json").write_text(json.dumps(told))
    corpus = tiny.artifact(tmp_path / "corpus", Kind.CORPUS)
    found = contamination(suite(tmp_path / "prompts", digest="abc", **config), corpus)
    assert why in found and bool(why) == bool(found)


def test_evaluation_marks_or_refuses_such_a_suite(inputs, tmp_path):
    (tmp_path / "corpus").mkdir()
    given = {
        "model": inputs["start"],
        "prompts": inputs["prompts"],
        "corpus": tiny.artifact(tmp_path / "corpus", Kind.CORPUS),
    }
    values = {"max_new_tokens": 4, "prompts_per_domain": 2, "dtype": "float32"}
    with pytest.raises(CuveeError, match="the suite math was not kept out of the training text .* data.benchmarks"):
        evaluate.run(evaluate.Config(**values, contaminated="refuse"), given, tmp_path, tiny.context(tmp_path / "a"))
    (tmp_path / "out").mkdir()
    evaluate.run(evaluate.Config(**values), given, tmp_path / "out", tiny.context(tmp_path / "b"))
    assert "math" in json.loads((tmp_path / "out/scores.json").read_text())["contaminated"]
