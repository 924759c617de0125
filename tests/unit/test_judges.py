"""Teachers as rewards: they grade what a policy samples, and several are the raters of a ranker."""

import json

import httpx
import pytest
from post_helpers import COMMON, RL, artifact, run

from stages.chat.render import response
from stages.rollout import sample
from stages.stage import ConfigError, CuveeError, Estimate, Kind, parse
from tests.unit.test_teacher import URL, answer

JUDGES = {"strict": {"model": "strict", "url": URL, "output_price": 1.0}, "kind": {"model": "kind", "url": URL}}
VALUES = {"prompts": 12, "completions": 3, "max_new_tokens": 6, "sequence_length": 128,
          "rewards": {"strict": 1.0, "kind": 0.5}, "judges": JUDGES}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """`strict` gives 5 points where the answer has an even number of characters and 1 elsewhere, `kind` always 4. Returns the bodies."""
    own, bodies = httpx.Client, []

    def handle(request):
        body = json.loads(request.content)
        bodies.append(body)
        text = body["messages"][-1]["content"].split("[Answer]\n")[1].split("\n\nFirst write")[0]
        points = 4 if body["model"] == "kind" else 1 if len(text) % 2 else 5
        return httpx.Response(200, json=answer(json.dumps({"reasons": "", "points": points})))

    monkeypatch.setattr(httpx, "Client", lambda transport=None: own(transport=httpx.MockTransport(handle)))
    return bodies


def rows(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_judges_reward_what_is_sampled(speaker, prompts, tmp_path, asked):
    metrics = run("rollout.sample", VALUES, tmp_path / "out", policy=speaker, prompts=prompts)
    for row in rows(tmp_path / "out"):
        expected = [0.2 if len(response(text)) % 2 else 1.0 for text in row["completions"]]
        assert row["parts"] == {"strict": expected, "kind": [0.8] * 3}
        assert row["rewards"] == pytest.approx([value + 0.4 for value in expected])
    most = sample.estimate(parse(sample.Config, VALUES, "samples"), {"policy": Estimate()}).requests
    assert 0 < len(asked) <= most == 12 * 3 * 2  # of two like completions one is asked about
    sent = [body["model"] for body in asked].count("strict")
    assert metrics["requests/strict"] == sent and metrics["cost/strict"] == pytest.approx(sent * 5 / 1e6) and metrics["cost/kind"] == 0
    assert 0.2 <= metrics["reward/strict"] <= 1 and metrics["reward/kind"] == pytest.approx(0.8)


def test_rl_learns_from_a_judge_and_asks_nothing_twice(speaker, prompts, tmp_path, asked):
    values = {**RL, "steps": 2, "rewards": {"strict": 1.0}, "judges": {"strict": JUDGES["strict"]}}
    metrics = run("train.rl", values, tmp_path / "out", init=speaker, prompts=prompts)
    assert 0.2 <= metrics["reward_last"] <= 1 and len(asked) == len({json.dumps(body) for body in asked}) > 0


def test_several_judges_are_the_raters_of_a_ranker(speaker, prompts, tmp_path, asked):
    run("rollout.sample", {**VALUES, "prompts": 40}, tmp_path / "out", policy=speaker, prompts=prompts)
    pairs = artifact(tmp_path / "out", Kind.PAIRS)
    values = {**COMMON, "steps": 4, "batch_groups": 8, "elo": True, "margin": 0.001, "heldout": 0.3}
    assert run("train.reward", values, tmp_path / "ranker", init=speaker, pairs=pairs)["pairs"] > 0


def test_a_judge_spends_no_more_than_it_may(speaker, prompts, tmp_path, asked):
    with pytest.raises(CuveeError, match="budget"):
        run("rollout.sample", {**VALUES, "judges_budget": 1e-5}, tmp_path / "out", policy=speaker, prompts=prompts)


@pytest.mark.parametrize("changed, words", [
    ({"rewards": {"strict": 1.0, "kinder": 1.0}}, "rewards: 'kinder' is not known; did you mean 'kind'"),
    ({"rewards": {"strict": 1.0}}, "judges: kind has no weight in rewards; give it one"),
    ({"judges": JUDGES | {"verifier": JUDGES["kind"]}}, "judges: verifier is a reward's name too"),
    ({"judges": JUDGES | {"kind": {"model": "m"}}}, "judges.kind: model is 'm', url ''; give"),
    ({"judges": JUDGES | {"kind": {"mode": "m"}}}, "judges.kind.*did you mean 'model'"),
])  # fmt: skip
def test_refusals(changed, words, prompts, speaker):
    with pytest.raises(ConfigError, match=words):
        sample.check(parse(sample.Config, VALUES | changed, "samples"), {"policy": speaker, "prompts": prompts})


def test_where_a_judge_runs_changes_no_address():
    def external(**changed):
        judges = {"strict": JUDGES["strict"] | changed}
        return sample.external(parse(sample.Config, VALUES | {"judges": judges}, "samples"))

    assert external(url="http://elsewhere/v1", output_price=2.0) == external() != external(model="other")
    assert sample.external(parse(sample.Config, {}, "samples")) == {}
