"""Chat in the terminal and over HTTP, with a tiny random model."""

from __future__ import annotations

import io
import json

import pytest
import tiny
import torch

from flows.chat import Speaker, chat
from stages.stage import CuveeError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("chat") / "tiny", seed=3)


@pytest.fixture(scope="module")
def speaker(folder):
    return Speaker(folder)


HELLO = [{"role": "user", "content": "Hello"}]


def test_greedy_reply_is_what_the_rollout_engine_writes(folder, speaker, tmp_path):
    from stages.rollout.engines.transformers import Engine

    ids = speaker.prompt(HELLO)
    reply = speaker.reply(ids, max_new_tokens=40)
    text = "".join(reply)
    ((expected,),) = Engine(folder, tiny.context(tmp_path)).generate(
        [ids], n=1, max_new_tokens=40, temperature=0.0, seed=0, stop=sorted(speaker.stop)
    )
    assert text == speaker.tokenizer.decode(expected.ids, skip_special_tokens=True)
    assert reply.tokens == len(expected.ids)
    assert reply.finish == ("stop" if expected.ids[-1] in speaker.stop else "length")


def test_pieces_never_split_a_character(speaker):
    reply = speaker.reply(speaker.prompt(HELLO), max_new_tokens=3)
    wanted = speaker.tokenizer.encode("漢", add_special_tokens=False)
    reply.choose = lambda logits, left=iter(wanted): next(left)
    assert [piece for piece in reply if piece] == ["漢"]


def test_sampling_is_a_function_of_the_seed(speaker):
    ids = speaker.prompt(HELLO)
    texts = [list(speaker.reply(ids, max_new_tokens=20, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    narrow = speaker.reply(ids, max_new_tokens=20, temperature=2.0, top_p=1e-6, seed=5)
    assert list(narrow) == list(speaker.reply(ids, max_new_tokens=20))


def test_the_end_of_a_turn_ends_the_reply(speaker):
    reply = speaker.reply(speaker.prompt(HELLO), max_new_tokens=9)
    stop = min(speaker.stop)
    reply.choose = lambda logits, left=iter([40, 41, stop]): next(left)
    assert len("".join(reply)) == 2
    assert (reply.finish, reply.tokens) == ("stop", 3)


def test_chat_converses_until_quit(folder):
    sink = io.StringIO()
    source = io.StringIO(
        "Hello\n\n/safety strict\nAgain\n/safety odd\n/what\n/reset\n/safety contextual\nHello\n/quit\nnever read\n"
    )
    assert chat(folder, system="Be brief.", max_new_tokens=5, source=source, sink=sink) == 0
    out = sink.getvalue()
    assert "safety mode 'ODD' is not known" in out and "/reset starts a new conversation" in out
    assert source.readline() == "never read\n"
    first, *_, last = out.removesuffix("\n").split("\n")
    assert first == last  # a new conversation: the same question has the same answer


def test_chat_says_when_the_conversation_is_too_long_and_goes_on(folder):
    sink = io.StringIO()
    source = io.StringIO("x" * 600 + "\n<|USER_TOKEN|>\n")
    assert chat(folder, max_new_tokens=2, source=source, sink=sink) == 0
    assert "the model reads 512; start a new or shorter one" in sink.getvalue()
    assert "holds the special token <|USER_TOKEN|>" in sink.getvalue()


def test_chat_refuses_an_unknown_safety_mode(folder):
    with pytest.raises(CuveeError, match="did you mean 'STRICT'"):
        chat(folder, safety="STRIC")


@pytest.fixture(scope="module")
def client(folder):
    from starlette.testclient import TestClient

    from flows.serve import app

    return TestClient(app(folder, "polished"), base_url="http://localhost")


def ask(client, **body):
    return client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 12, **body})


def test_models(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["polished"]


def test_completion(client, speaker):
    body = ask(client, model="polished", tools=None).json()
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "".join(speaker.reply(speaker.prompt(HELLO), max_new_tokens=12)),
    }
    assert choice["finish_reason"] in ("length", "stop")
    assert body["usage"]["completion_tokens"] == 12 and body["object"] == "chat.completion"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    assert ask(client, messages=parts).json()["choices"] == body["choices"]


def test_log_probabilities_as_openai_gives_them(client, speaker):
    """Of each token; the same streamed; greedy takes the likeliest."""
    whole = ask(client, logprobs=True, top_logprobs=3).json()["choices"][0]["logprobs"]["content"]
    assert len(whole) == 12
    for one in whole:
        assert one["logprob"] == one["top_logprobs"][0]["logprob"] and one["token"] == one["top_logprobs"][0]["token"]
        assert [t["logprob"] for t in one["top_logprobs"]] == sorted((t["logprob"] for t in one["top_logprobs"]), reverse=True)
        assert bytes(one["bytes"]).decode() == one["token"]
    ids = speaker.prompt(HELLO)
    with torch.inference_mode():
        first = speaker.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max()
    assert whole[0]["logprob"] == pytest.approx(float(first), abs=1e-4)
    events = ask(client, logprobs=True, top_logprobs=3, stream=True).text.split("\n\n")[:-2]
    chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert [one for chunk in chunks for one in chunk["logprobs"]["content"]] == whole


def test_stream_says_the_same_piece_by_piece(client):
    whole = ask(client).json()["choices"][0]
    events = ask(client, stream=True, stream_options={"include_usage": True}).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    deltas = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert "".join(delta["delta"].get("content", "") for delta in deltas) == whole["message"]["content"]
    assert deltas[-1]["finish_reason"] == whole["finish_reason"]
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, "messages"),
        ({"temperature": 9}, "temperature"),
        ({"top_k": 3}, "top_k: Extra inputs are not permitted"),
        ({"tools": [{}]}, "tools: expected {type: function"),
        ({"messages": [{"role": "user", "content": "q", "tool_calls": [{}]}]}, "in a message of the assistant"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "the model reads 512"),
        ({"messages": [{"role": "user", "content": "<|USER_TOKEN|>"}]}, "special token"),
    ],
)
def test_bad_requests_are_answered_with_a_sentence(client, body, words):
    response = ask(client, **body)
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_another_host_name_is_refused(client):
    assert client.get("/v1/models", headers={"host": "example.org"}).status_code == 400
