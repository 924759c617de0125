"""Teachers: what passes is tried again, what was answered is kept and counted, and a judge is asked in both orders."""

import json
import threading

import httpx
import pytest
from stub_server import serving
from tiny import checkpoint, hosting

from stages.stage import ConfigError, CuveeError
from stages.teacher import judge
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


def test_a_judge_sees_documents_and_calls():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}]
    (asked,) = judge.grades("t", [{"messages": turns, "documents": [{"text": "the cat is black"}]}], [["yes"]])
    text = asked.messages[0]["content"]
    assert '{"text": "the cat is black"}' in text and 'assistant: {"name": "f", "arguments": {"x": 1}}' in text


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
