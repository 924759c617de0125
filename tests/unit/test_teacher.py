"""Teachers: what passes is tried again, what was answered is kept and counted, and the best answer becomes training data."""

import json
import random
import threading

import httpx
import pytest
from post_helpers import artifact, context
from stub_server import serving
from tiny import checkpoint, hosting, jsonl

from stages.chat.messages import openai
from stages.data import synthetic
from stages.stage import ConfigError, CuveeError, Kind, identity, parse
from stages.teacher import compare, judge
from stages.teacher.client import Client, Request, Usage, teachers

URL = "http://teacher.test/v1"


class Clock:
    """Time that passes only while someone sleeps."""

    def __init__(self):
        self.now, self.slept, self.lock = 0.0, [], threading.Lock()

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        with self.lock:
            self.now += seconds
            self.slept.append(round(seconds, 6))


def answer(text, prompt_tokens=10, completion_tokens=5, finish="stop", **message):
    return {
        "choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
    }


def client(tmp_path, handler, clock=None, budget=0.0, **more):
    """A Client of one teacher `t`, whose requests' bodies `handler` answers: a dict, or an httpx.Response, or an exception."""
    seen = []

    def handle(request):
        body = json.loads(request.content)
        seen.append(body)
        found = handler(body, len(seen))
        if isinstance(found, Exception):
            raise found
        return found if isinstance(found, httpx.Response) else httpx.Response(200, json=found)

    values = {"model": "m", "url": URL, "concurrency": 1, "max_tokens": 100, **more}
    made = Client(teachers({"t": values}, "x"), tmp_path / "cache", clock=clock or Clock(), budget=budget, transport=httpx.MockTransport(handle))
    made.seen = seen
    return made


def ask(text, **more):
    return Request("t", [{"role": "user", "content": text}], **more)


def test_what_passes_is_tried_again_over_real_sockets(tmp_path):
    """500, 429 with Retry-After, an answer that never comes, one that is none, and then the answer."""
    script = iter(["500", "429", "hang", "garbage", "ok"])
    bodies, hung = [], threading.Event()

    def reply(asked):
        bodies.append((asked.path, json.loads(asked.body), asked.headers.get("Authorization")))
        what = next(script)
        if what == "hang":
            hung.wait(60)
            return None
        content = answer("yes") if what == "ok" else {"error": {"message": "busy"}}
        return int(what) if what.isdigit() else 200, content, {"Retry-After": "7"} if what == "429" else {}

    clock = Clock()
    with serving(reply) as address:
        made = Client(teachers({"t": {"model": "m", "url": f"{address}/v1", "timeout": 4.0}}, "x"), tmp_path, clock=clock)
        (done,) = made.complete([ask("q", seed=3)])
        hung.set()
    assert done.text == "yes" and done.finish == "stop" and made.usage["t"] == Usage(1, 0, 4, 10, 5, 0.0)
    assert bodies[0][0] == "/v1/chat/completions" and bodies[0][2] is None and all(body == bodies[0] for body in bodies)
    expected = {"model": "m", "messages": [{"role": "user", "content": "q"}], "max_tokens": 1024, "temperature": 1.0, "top_p": 1.0, "seed": 3}
    assert bodies[0][1] == expected
    assert clock.slept[1] == 7.0 and 0.25 <= clock.slept[0] <= 0.5 and 1 <= clock.slept[2] <= 2 and 2 <= clock.slept[3] <= 4


def test_failures_end_in_a_sentence(tmp_path, monkeypatch):
    refused = client(tmp_path, lambda b, n: httpx.Response(401, json={"error": {"message": "bad\n key"}}))
    with pytest.raises(CuveeError, match="teacher t at .* refuses the request: status 401, bad key"):
        refused.complete([ask("q")])
    assert len(refused.seen) == 1
    monkeypatch.setenv("SOME_KEY", "canary-7f3a")
    echo = client(tmp_path, lambda b, n: httpx.Response(401, json={"error": {"message": "wrong key: canary-7f3a"}}), key="SOME_KEY")
    with pytest.raises(CuveeError, match=r"status 401, wrong key: \(the key\)"):
        echo.complete([ask("q")])
    down = client(tmp_path, lambda b, n: httpx.ConnectError("refused"), attempts=3)
    with pytest.raises(CuveeError, match="failed 3 times, at last with ConnectError"):
        down.complete([ask("q")])
    assert len(down.seen) == 3 and down.usage["t"].retries == 3
    long = client(tmp_path, lambda b, n: httpx.Response(503, headers={"Retry-After": "3600"}))
    with pytest.raises(CuveeError, match="asks to wait 3600 s"):
        long.complete([ask("q")])
    with pytest.raises(CuveeError, match="variable NO_SUCH_KEY .* is not set"):
        client(tmp_path, None, key="NO_SUCH_KEY").complete([ask("q")])
    monkeypatch.setenv("BAD_KEY", "sécret\nX-Other: 1")
    with pytest.raises(CuveeError, match="variable BAD_KEY .* no header of HTTP can carry") as told:
        client(tmp_path, None, key="BAD_KEY").complete([ask("q")])
    assert "cret" not in str(told.value)
    with pytest.raises(CuveeError, match="teacher: 'u' is not known"):
        client(tmp_path, None).complete([Request("u", [])])
    for values, reason in (({"t": {"model": "m"}}, "x.t: model is 'm', url ''"), ({"t": {"modle": "m"}}, "did you mean 'model'"), ({"t": "polished"}, "x.t: 'polished' is no teacher"),
                           ({"t": {"model": "m", "url": URL, "attempts": 0}}, "x.t.attempts")):  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            teachers(values, "x")


def test_answers_are_kept_by_their_request_and_paid_once(tmp_path):
    prices = {"input_price": 2.0, "output_price": 10.0}
    first = client(tmp_path, lambda b, n: answer(b["messages"][0]["content"].upper()), **prices)
    requests = [ask("a"), ask("b"), ask("a"), ask("a", seed=1), ask("a", options={"temperature": 0.0})]
    assert [c.text for c in first.complete(requests)] == ["A", "B", "A", "A", "A"]
    assert len(first.seen) == 4, "two are the same request"
    assert first.usage["t"].requests == 4 and first.usage["t"].cost == pytest.approx(4 * (10 * 2 + 5 * 10) / 1e6)
    again = client(tmp_path, None, **{**prices, "input_price": 3.0})
    assert [c.text for c in again.complete(requests)] == ["A", "B", "A", "A", "A"]
    assert again.usage["t"] == Usage(cached=4)
    other = client(tmp_path, lambda b, n: answer("other"), model="m2")
    assert other.complete([ask("a")])[0].text == "other"


def test_a_dry_run_counts_and_sends_nothing(tmp_path):
    made = client(tmp_path, lambda b, n: answer("x"), input_price=1.0, output_price=2.0)
    made.complete([ask("a" * 400)])
    found = made.dry([ask("a" * 400), ask("b" * 400), ask("c" * 400)])["t"]
    assert len(made.seen) == 1 and found.cached == 1 and found.requests == 2
    assert 2 * 100 <= found.prompt_tokens <= 2 * 120 and found.completion_tokens == 200
    assert found.cost == pytest.approx((found.prompt_tokens + 2 * 200) / 1e6)


def test_the_budget_ends_before_more_is_spent_and_the_next_run_goes_on(tmp_path):
    values = {"output_price": 1e6, "input_price": 0.0, "budget": 12.0}
    made = client(tmp_path, lambda b, n: answer("x"), **values)
    with pytest.raises(CuveeError, match="budget: 15 of 12 is spent"):
        made.complete([ask(str(i)) for i in range(10)])
    assert len(made.seen) == 3
    more = client(tmp_path, lambda b, n: answer("x"), **{**values, "budget": 0.0})
    more.complete([ask(str(i)) for i in range(10)])
    assert len(more.seen) == 7


def test_limits_space_the_requests(tmp_path):
    clock = Clock()
    client(tmp_path / "a", lambda b, n: answer("x"), clock, requests_per_minute=30).complete([ask(str(i)) for i in range(4)])
    assert clock.slept == [2.0] * 3
    clock = Clock()
    made = client(tmp_path / "b", lambda b, n: answer("x"), clock, tokens_per_minute=600, max_tokens=90)
    made.complete([ask(str(i)) for i in range(3)])
    assert len(clock.slept) == 2 and all(9.0 < pause < 12.0 for pause in clock.slept), "100 tokens or so at 10 a second"
    clock = Clock()
    date = {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}
    made = client(tmp_path / "c", lambda b, n: answer("x") if n > 1 else httpx.Response(429, headers=date), clock)
    assert made.complete([ask("q")])[0].text == "x", "a date that has passed is no wait"


def test_tool_calls_both_ways_and_fields_of_the_body(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret\n")
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    replies = [answer(None, finish="tool_calls", tool_calls=[call]), answer(""), answer(None, tool_calls=[{"function": {"name": "f", "arguments": "{"}}])]
    made = client(tmp_path, lambda b, n: replies[n - 1], extra={"seed": None, "top_k": 3}, key="SOME_KEY")
    neutral = {"id": "c0", "type": "function", "function": {"name": "f", "arguments": {"x": 0}}}
    history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [neutral]},
               {"role": "tool", "tool_call_id": "c0", "content": {"y": 1}}]  # fmt: skip
    one, empty, broken = made.complete([Request("t", history, tools=[{"type": "function"}]), ask("a"), ask("b")])
    assert one.message == {"role": "assistant", "content": "", "tool_calls": [{**call, "function": {"name": "f", "arguments": {"x": 1}}}]}
    assert empty.message is None and broken.message is None and empty.text == ""
    body = made.seen[0]
    assert body["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"x": 0}' and body["messages"][2]["content"] == '{"y": 1}'
    assert "thinking" not in body["messages"][1], "OpenAI refuses fields that it does not know"
    assert "seed" not in body and body["top_k"] == 3 and body["tools"] == [{"type": "function"}]


def test_a_judge_is_asked_in_both_orders(tmp_path):
    """One that always prefers what stands first only makes ties; one that reads makes wins."""
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}], "answer": "known"} for i in range(4)]

    def verdict(better):
        return answer(f'{{"reasons": "it said \\"better\\": \\"B\\"", "better": "{better}"}}')

    biased = client(tmp_path / "a", lambda b, n: verdict("A"))
    found = judge.compare(biased, "t", rows, ["good"] * 4, ["bad"] * 4)
    assert found.wins == [0.5] * 4 and found.consistent == 0.0 and found.unreadable == 0
    assert "known" in biased.seen[0]["messages"][0]["content"] and biased.seen[0]["temperature"] == 0.0

    def read(body, n):
        text = body["messages"][0]["content"]
        if "q3" in text:
            return answer("I can't say")
        first, second = (text.split(f"[Answer {x}]\n")[1].split("\n")[0] for x in "AB")
        return verdict("tie" if first == second else "A" if first == "good" else "B")

    found = judge.compare(client(tmp_path / "b", read), "t", rows, ["good", "bad", "good", "good"], ["bad", "good", "good", "bad"])
    assert found.wins == [1.0, 0.0, 0.5, 0.5] and found.consistent == 0.75 and found.unreadable == 2
    graded = client(tmp_path / "c", lambda b, n: answer(f'{{"reasons": "", "points": {n}}}' if n < 3 else "?"))
    assert judge.grade(graded, "t", rows[:2], [["x", "y"], ["z"]]) == [[1.0, 2.0], [0.0]]


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
    return synthetic.run(config, inputs, out, context(tmp_path / f"{name}-scratch")), out


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


def test_a_judge_sees_documents_and_calls():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}]
    (asked,) = judge.grades("t", [{"messages": turns, "documents": [{"text": "the cat is black"}]}], [["yes"]])
    text = asked.messages[0]["content"]
    assert '{"text": "the cat is black"}' in text and 'assistant: {"name": "f", "arguments": {"x": 1}}' in text


def test_where_a_teacher_runs_and_what_it_costs_is_no_part_of_the_address():
    def address(**values):
        config = parse(synthetic.Config, {"teachers": {"t": {"model": "m", "url": URL, **values}}}, "")
        return identity(config), synthetic.external(config)

    assert address() == address(url="http://other/v1", input_price=3.0, key="K", timeout=1.0)
    assert address() != address(temperature=0.5) and address() != address(model="n")


def test_a_served_model_is_a_teacher(tmp_path, monkeypatch):
    from flows.serve import app

    with hosting(app(checkpoint(tmp_path / "model"), "tiny")) as address:
        values = {"model": "tiny", "url": f"{address}/v1", "max_tokens": 8}
        made = Client(teachers({"t": values}, "x"), tmp_path / "cache")
        requests = [ask("Hello", seed=i) for i in range(3)]
        found = made.complete(requests)
        usage = made.usage["t"]
        assert usage.requests == 3 and usage.completion_tokens <= 24 and usage.prompt_tokens == 3 * len(b"Hello") + 3 * 6
        assert any(c.text for c in found), "an untrained model says something in eight bytes"
        assert [c.message for c in Client(made.teachers, tmp_path / "other").complete(requests)] == [c.message for c in found]
        with pytest.raises(CuveeError, match="refuses the request: status 400, temperature"):
            made.complete([ask("x", options={"temperature": 3.0})])
        # What it would say if it knew: a call of the tool, under the tokens of the template.
        from transformers import AutoTokenizer

        text = '<|START_ACTION|>\n{"tool_call_id": "0", "tool_name": "f", "parameters": {"x": "é"}}<|END_ACTION|><|END_OF_TURN_TOKEN|>'
        tokens = iter(AutoTokenizer.from_pretrained(tmp_path / "model").encode(text, add_special_tokens=False))
        monkeypatch.setattr("flows.chat._choose", lambda *_: next(tokens))
        tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
        asked = [{"role": "user", "content": "q"}]
        values["max_tokens"] = 200
        agent = Client(teachers({"t": values}, "x"), tmp_path / "cache")
        (done,) = agent.complete([Request("t", asked, tools=tools)])
        call = {"type": "function", "id": "0", "function": {"name": "f", "arguments": {"x": "é"}}}
        assert done.finish == "tool_calls" and done.message == {"role": "assistant", "content": "", "tool_calls": [call]}
        before = agent.usage["t"].prompt_tokens
        tokens = iter([8])  # the end of the turn
        history = [*asked, done.message, {"role": "tool", "tool_call_id": "0", "content": {"y": 2}}]
        (done,) = agent.complete([Request("t", history, tools=tools)])
        assert done.message is None and agent.usage["t"].prompt_tokens > 2 * before + len(text.encode()) - 60
        with pytest.raises(CuveeError, match="status 400, .*stream"):
            agent.complete([Request("t", asked, tools=tools, options={"stream": True})])
