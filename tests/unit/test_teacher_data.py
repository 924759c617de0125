"""What teachers write becomes training data: the best answer of a pool is kept, and a judge's win rates are an artifact."""

import json
import random

import httpx
import pytest
from post_helpers import artifact, context
from tiny import jsonl

from stages.chat.messages import openai
from stages.data import synthetic
from stages.stage import ConfigError, CuveeError, Kind, identity, parse
from stages.teacher import compare
from tests.unit.test_teacher import URL, answer

PROMPTS = [{"id": f"p{i}", "domain": "math", "messages": [{"role": "user", "content": f"{i} + 1?"}], "answer": str(i + 1),
            "check": {"number": i + 1}} for i in range(6)]  # fmt: skip


@pytest.fixture
def pool(monkeypatch):
    """Two teachers and a judge behind one transport: `even` is right on even prompts, `odd` on the others and wordy on all."""
    bodies = []

    def handle(request):
        body = json.loads(request.content)
        bodies.append(body)
        text = body["messages"][-1]["content"]
        if body["model"] == "judge":
            points = [5 if len(part.split("\n")[0]) > 10 else 1 for part in text.split("[Answer]\n")[1:]][0]
            return httpx.Response(200, json=answer(json.dumps({"reasons": "", "points": points})))
        if body["model"] == "chooser":
            first, second = (part.split("\n")[0] for part in text.split("[Answer A]\n")[1].split("[Answer B]\n"))
            better = "tie" if first == second else "A" if second == "0" else "B"
            return httpx.Response(200, json=answer(f'{{"reasons": "", "better": "{better}"}}'))
        number = int(text.split()[0])
        right = body["model"] == "odd" if number % 2 else True
        told = str(number + 1) if right else "no idea"
        told = f"It is, I think, {told}" if body["model"] == "odd" else told
        return httpx.Response(200, json=answer(told, finish="length" if number == 5 else "stop"))

    own = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda transport=None: own(transport=httpx.MockTransport(handle)))
    return bodies


def make(tmp_path, name="out", prompts=PROMPTS, **values):
    jsonl(tmp_path / "prompts" / "train.jsonl", prompts)
    inputs = {"prompts": {prompts[0]["domain"]: artifact(tmp_path / "prompts", Kind.PROMPTS)}}
    known = {n: {"model": n, "url": URL, "output_price": 1.0} for n in ("even", "odd")}
    config = parse(synthetic.Config, {"teachers": known, "prompts": 6, **values}, "synthetic")
    synthetic.check(config, inputs)
    out = tmp_path / name
    out.mkdir()
    metrics = synthetic.run(config, inputs, out, context(tmp_path / f"{name}-scratch"))
    assert 0 < metrics["requests"] + metrics["cached"] <= synthetic.estimate(config, inputs).requests
    return metrics, out


def test_the_best_answer_of_a_pool_is_kept(tmp_path, pool):
    metrics, out = make(tmp_path)
    rows = {row["id"]: row for row in map(json.loads, (out / "train.jsonl").read_text().splitlines())}
    assert {i: row["teacher"] for i, row in rows.items()} == {"p0": "even", "p1": "odd", "p2": "even", "p3": "odd", "p4": "even"}
    assert rows["p1"]["messages"] == [*PROMPTS[1]["messages"], {"role": "assistant", "content": "It is, I think, 2"}]
    assert metrics["conversations"] == 5 and metrics["requests"] == 12 and metrics["chosen/even"] == 0.6 and metrics["reward"] == 1.0
    assert metrics["cost"] == pytest.approx(12 * 5 / 1e6)
    candidates = [json.loads(one) for one in (out / "candidates.jsonl").read_text().splitlines()]
    assert len(candidates) == 6 and sum(c["chosen"] is None for c in candidates) == 1, "answers cut short are never kept"
    from stages.chat.messages import conversation

    assert all(conversation(row) for row in rows.values())


def test_a_judge_chooses_among_what_the_verifier_accepts(tmp_path, pool):
    known = {n: {"model": n, "url": URL} for n in ("even", "odd", "judge")}
    _, out = make(tmp_path, teachers=known, judge="judge")
    rows = {row["id"]: row["teacher"] for row in map(json.loads, (out / "train.jsonl").read_text().splitlines())}
    assert rows == dict.fromkeys(["p0", "p1", "p2", "p3", "p4"], "odd"), "the wordy one, where both are right"
    assert sum(body["model"] == "judge" for body in pool) == 6, "two answers of three prompts: one alone needs no judge"


def test_win_rates_of_a_judge_are_an_artifact(tmp_path, pool):
    """The judge of `pool` grades; a comparison it can't read is a tie, so here is one that can."""

    def scores(name, texts):
        jsonl(tmp_path / name / "samples.jsonl", [{"id": p["id"], "completion": t} for p, t in zip(PROMPTS, texts, strict=True)])
        return artifact(tmp_path / name, Kind.SCORES)

    jsonl(tmp_path / "prompts" / "heldout.jsonl", PROMPTS)
    inputs = {"prompts": {"math": artifact(tmp_path / "prompts", Kind.PROMPTS)}, "baseline": scores("base", ["0"] * 6),
              "models": {"better": scores("better", ["1", "2", "3", "4", "0", "0"]), "same": scores("same", ["0"] * 6)}}  # fmt: skip
    values = {"teachers": {"j": {"model": "chooser", "url": URL, "output_price": 1.0}}}
    config = parse(compare.Config, values, "judged")
    compare.check(config, inputs)
    assert compare.estimate(parse(compare.Config, {**values, "prompts_per_domain": 6}, "judged"), inputs).requests == 24
    out = tmp_path / "out"
    out.mkdir()
    metrics = compare.run(config, inputs, out, context(tmp_path / "scratch"))
    assert metrics["win_rate/better"] == pytest.approx((4 + 2 * 0.5) / 6) and metrics["win_rate/same"] == 0.5
    assert metrics["consistent/better"] == 1.0 and metrics["cost"] == pytest.approx(5 * 14 / 1e6), "one of two like requests is sent"
    table = json.loads((out / "win_rates.json").read_text())["models"]["better"]
    assert table["rates"]["math"]["low"] < 5 / 6 < table["rates"]["math"]["high"] and table["unreadable"] == 0
    assert len((out / "verdicts.jsonl").read_text().splitlines()) == 12
    with pytest.raises(CuveeError, match=r"dry_run: 0 requests to j \(24 answers"):
        compare.run(parse(compare.Config, {**values, "dry_run": True}, ""), inputs, out, context(tmp_path / "scratch"))
    inputs["baseline"] = scores("other", ["0"] * 6)
    jsonl(tmp_path / "other" / "samples.jsonl", [{"id": "p0", "completion": "0"}])
    with pytest.raises(CuveeError, match="better and the baseline answered 5 prompts apart"):
        compare.run(config, inputs, out, context(tmp_path / "scratch"))
    for changed, reason in (({}, "teachers: is empty"), ({**values, "judge": "k"}, "judge: 'k' is not known")):
        with pytest.raises(ConfigError, match=reason):
            compare.check(parse(compare.Config, changed, ""), inputs)


def test_pools_dry_run_cache_and_refusals(tmp_path, pool):
    with pytest.raises(CuveeError, match=r"dry_run: 12 requests to even, odd \(0 answers .* at most 12,288 of answers, at most 0.01229"):
        make(tmp_path, dry_run=True)
    assert not pool
    make(tmp_path, "one", pools={"math": ["even"]}, cache=str(tmp_path / "kept"), completions=2)
    assert {body["model"] for body in pool} == {"even"} and {body["seed"] for body in pool} == {0, 1}
    before = len(pool)
    metrics, _ = make(tmp_path, "two", cache=str(tmp_path / "kept"), completions=2)
    assert metrics["cached"] == 12 and len(pool) == before + 12
    with pytest.raises(CuveeError, match="min_reward: of 12 answers to 6 prompts 10 are whole"):
        make(tmp_path, "three", min_reward=2.0)
    for values, reason in (({"teachers": {}}, "teachers: is empty"), ({"judge": "odds"}, "judge: 'odds' is not known; did you mean 'odd'"),
                           ({"pools": {"maths": ["odd"]}}, "pools: 'maths'"), ({"pools": {"math": ["x"]}}, "pools.math: 'x'"),
                           ({"rewards": {"verifyer": 1.0}}, "rewards: 'verifyer'")):  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            make(tmp_path, "four", **values)


def answering(monkeypatch, handle):
    """Every teacher's server is `handle`, of a request's body. Returns the bodies."""
    own, bodies = httpx.Client, []

    def respond(request):
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json=handle(bodies[-1]))

    monkeypatch.setattr(httpx, "Client", lambda transport=None: own(transport=httpx.MockTransport(respond)))
    return bodies


def test_teachers_that_never_end_a_turn_are_told_from_wrong_ones(tmp_path, monkeypatch):
    others = ["", "7<|END_OF_TURN_TOKEN|>", "<|im_end|>"]  # no text to train on may hold those
    answering(monkeypatch, lambda body: answer("7 " * 9, finish="length") if body["model"] == "even" else answer(others[int(body["messages"][-1]["content"][0]) % 3]))
    with pytest.raises(CuveeError, match=r"none of 12 answers to 6 prompts is whole: 6 do not end within max_tokens \(even: 1024, odd: 1024\), "
                                         "the others are empty or hold special tokens; raise max_tokens, or ask"):  # fmt: skip
        make(tmp_path)


def test_a_teacher_that_calls_tools_and_reads_documents_is_rewarded_for_it(tmp_path, monkeypatch):
    from stages.tasks import rag
    from tests.unit.test_tasks import DOCUMENTS

    def rows(kind):
        options = parse(rag.Options, {"kinds": [kind], "form": "template"}, "x")
        made = rag.generate(random.Random(3), 30, DOCUMENTS, options)
        return [{"id": f"r{i}", "domain": "rag", **p} for i, p in enumerate(p for p in made if (kind == "agent") == ("reply" in p))][:6]

    agent, facts = rows("agent"), rows("facts")

    def solve(body):
        assert "thinking" not in str(body["messages"])
        if body.get("documents"):
            return answer(next(row["answer"] for row in facts if row["documents"] == body["documents"]))
        row = next(r for r in agent if r["messages"][0]["content"] == body["messages"][0]["content"] and len(r["messages"]) == len(body["messages"]))
        return answer(None, finish="tool_calls", tool_calls=openai(row["reply"])["tool_calls"])

    bodies = answering(monkeypatch, solve)
    one = {"t": {"model": "t", "url": URL}}
    metrics, out = make(tmp_path, "agent", agent, teachers=one)
    assert metrics["conversations"] == len(agent) and metrics["reward"] == 1.0
    learned = [json.loads(line)["messages"][-1] for line in open(out / "train.jsonl")]
    assert all(turn["tool_calls"] and not turn["content"] for turn in learned)
    metrics, _ = make(tmp_path, "facts", facts, teachers=one)
    assert metrics["reward"] == 1.0 and all(body["documents"] for body in bodies[-len(facts) :])


def test_where_a_teacher_runs_and_what_it_costs_is_no_part_of_the_address():
    def address(**values):
        config = parse(synthetic.Config, {"teachers": {"t": {"model": "m", "url": URL, **values}}}, "")
        return identity(config), synthetic.external(config)

    assert address() == address(url="http://other/v1", input_price=3.0, key="K", timeout=1.0)
    assert address() != address(temperature=0.5) and address() != address(model="n")
