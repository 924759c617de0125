"""A user's conversations become training data: what is refused is told by line, what is kept is learned, and only the assistant's."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from post_helpers import artifact, context, save_checkpoint
from tiny import jsonl, tokenizer
from transformers import AutoTokenizer

from stages.chat.messages import Refused, conversation
from stages.data.conversations import advice, previews
from stages.stage import ConfigError, CuveeError, Kind, load, parse
from stages.train import sft

COMMON = {"sequence_length": 160, "schedule": "constant", "weight_decay": 0.0, "beta2": 0.99, "log_every": 1000}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(name, arguments, **more):
    return {"type": "function", **more, "function": {"name": name, "arguments": arguments}}


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}
GOOD = [
    {"messages": [user("Hi"), assistant("Hello")]},
    {"prompt": "q", "completion": "a"},
    {"prompt": [{"role": "developer", "content": "s"}, user("q")], "completion": [assistant("b")]},
    {"messages": [user("q"), assistant("", tool_calls=[call("f", '{"x": 1}', id="c")]),
                  {"role": "tool", "tool_call_id": "c", "content": {"y": 2}}, assistant("2")], "tools": [TOOL]},
    {"messages": [user("q"), assistant("<co>d</co: 0:[0]>")], "documents": [{"text": "d"}], "safety_mode": "STRICT"},
]  # fmt: skip
BAD = [  # record or line, reason
    ("{not json", "no JSON in UTF-8"),
    (b'{"messages": "\xff"}', "no JSON in UTF-8"),
    ("[1]", "no JSON object"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "messages: expected a list of messages"),
    ({"messages": [{"role": "human", "content": "x"}]}, "messages: expected roles system"),
    ({"messages": [user(7), assistant("a")]}, "content: expected a text or a list of parts"),
    ({"messages": [user([{"type": "image", "url": "x"}]), assistant("a")]}, "content: expected a text, or parts of type"),
    ({"messages": [user("q")]}, "messages: the last one must be the assistant's"),
    ({"messages": [assistant("a")]}, "messages: the first one after the system message must be the user's"),
    ({"messages": [user("q"), assistant("")]}, "messages: an assistant's message without content or tool_calls"),
    ({"messages": [user("q"), assistant("", tool_calls=[call("f", {})])]}, "tool_calls: a function that `tools` does not declare"),
    ({"messages": [user("q"), assistant("", tool_calls=[call("f", "{")])], "tools": [TOOL]}, "tool_calls: expected arguments"),
    ({"messages": [user("q"), assistant("", tool_calls=[call("f", {})]), user("r"), assistant("a")], "tools": [TOOL]},
     "messages: tool_calls and the tool messages that answer them differ"),
    ({"messages": [user("q"), assistant("", tool_calls=[call("f", {}), call("f", {})]), {"role": "tool", "content": "x"}, assistant("a")],
      "tools": [TOOL]}, "messages: tool_calls and the tool messages that answer them differ"),
    ({"messages": [user("q"), {"role": "tool", "tool_call_id": "c", "content": "x"}, assistant("a")]},
     "messages: tool_calls and the tool messages that answer them differ"),
    ({"messages": [user("q"), assistant("", tool_calls=[call("f", {}, id="c")]), {"role": "tool", "tool_call_id": "d", "content": "x"},
                   assistant("a")], "tools": [TOOL]}, "the chat template refuses it"),
    ({"messages": [user("q"), assistant("a")], "tools": [{"name": "f"}]}, "tools: expected {type: function"),
    ({"messages": [user("q"), assistant("a")], "documents": ["d"]}, "documents: expected a list of objects"),
    ({"messages": [user("q"), assistant("a")], "safety_mode": 3}, "safety_mode: expected str"),
    ({"messages": [user("<|USER_TOKEN|>"), assistant("a")]}, "the chat template refuses it"),
    ('{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "a"}]}', "lone surrogate in the text"),
    (GOOD[0], "the same conversation stands on an earlier line"),
]  # fmt: skip


def line(one) -> bytes:
    return one if isinstance(one, bytes) else (one if isinstance(one, str) else json.dumps(one)).encode()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return artifact(tokenizer(tmp_path_factory.mktemp("words") / "tokenizer"), Kind.TOKENIZER)


def conversations(sources, out, words, **values):
    """(rows, rejected, report, metrics) of the stage."""
    module = load("data.conversations")
    config = parse(module.Config, {"sources": [str(s) for s in sources], **values}, "conversations")
    module.check(config, {})
    out.mkdir()
    metrics = module.run(config, {"tokenizer": words}, out, context(out.with_name(out.name + "-scratch")))
    rows, rejected = ([json.loads(one) for one in (out / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "rejected"))
    return rows, rejected, json.loads((out / "report.json").read_text()), metrics


def test_every_line_is_kept_or_refused_with_its_reason(tmp_path, words):
    (tmp_path / "chats.jsonl").write_bytes(b"\n".join([*map(line, GOOD), b"", *(line(one) for one, _ in BAD)]))
    rows, rejected, report, metrics = conversations([tmp_path / "chats.jsonl"], tmp_path / "out", words, max_rejected=1.0)
    assert [row["id"] for row in rows] == [f"chats.jsonl:{i}" for i in range(1, 6)]
    assert rows[1]["messages"] == [user("q"), assistant("a")] and rows[2]["messages"][0] == {"role": "system", "content": "s"}
    assert rows[3]["messages"][1]["tool_calls"] == [call("f", {"x": 1}, id="c")] and rows[3]["tools"] == [TOOL]
    assert rows[4]["safety_mode"] == "STRICT" and rows[4]["documents"] == [{"text": "d"}]
    assert len(rejected) == len(BAD)
    for place, (told, (_, reason)) in enumerate(zip(rejected, BAD, strict=True), start=7):
        assert told["file"] == "chats.jsonl" and told["line"] == place and told["reason"].startswith(reason), told
    assert sum(r["count"] for r in report["reasons"].values()) == metrics["rejected"] == len(BAD)
    template = report["reasons"]["the chat template refuses it"]
    assert template["count"] == 2 and template["first"][1]["line"] == 26 and "<|USER_TOKEN|>" in template["first"][1]["found"]
    own = AutoTokenizer.from_pretrained(words.path)
    variables = ({k: v for k, v in row.items() if k not in ("id", "messages")} for row in rows)
    lengths = [len(own.apply_chat_template(row["messages"], return_dict=False, **v)) for row, v in zip(rows, variables, strict=True)]
    assert metrics["tokens"] == sum(lengths) and metrics["longest"] == max(lengths) and 0 < metrics["trained_tokens"] < sum(lengths)


def test_preview_shows_what_is_trained_and_what_is_refused(tmp_path, words):
    rows = [{"messages": [user("q"), assistant("one"), user("r"), assistant("two")]}, {"messages": [user("q")]}]
    (tmp_path / "chats.jsonl").write_bytes(b"\n".join(map(line, rows)))
    own = AutoTokenizer.from_pretrained(words.path)
    good, bad = previews(own, [str(tmp_path / "chats.jsonl")], "last")
    assert good.startswith("chats.jsonl:1: 21 tokens, 4 of them trained\n") and good.count("[[") == 1 and "[[two<|END_OF_TURN_TOKEN|>]]" in good
    assert bad.startswith("chats.jsonl:2 is refused: messages: the last one must be the assistant's")


def test_parquet_folders_compression_and_identity(tmp_path, words):
    folder = tmp_path / "chats"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(line(GOOD[0])))
    (folder / "notes.txt").write_text("no conversation")
    # Columns that only some rows have, as Parquet writes them: null; objects without fixed fields: JSON text.
    table = pa.Table.from_pylist([
        {"messages": [user("q1") | {"tool_calls": None}, assistant("", tool_calls=[{"function": {"name": "f", "arguments": '{"x": 1}'}}])],
         "tools": json.dumps([TOOL])},
        {"messages": [user("q2"), assistant("a2", tool_calls=None)], "tools": None},
    ])  # fmt: skip
    parquet.write_table(table, folder / "b.parquet")
    (folder / "c.parquet").write_bytes(b"PAR1 no")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(line(GOOD[1]) + b"\n" + b"x" * 1000)[:-12])
    parquet.write_table(pa.table({"prompt": pa.array([b"\xff"]).view(pa.string()), "completion": ["a"]}), folder / "e.parquet")
    parquet.write_table(pa.table({"prompt": ["damaged " * 999]}), folder / "f.parquet", use_dictionary=False)
    data = (folder / "f.parquet").read_bytes()
    (folder / "f.parquet").write_bytes(data[:40] + b"\xff" * 60 + data[100:])
    rows, rejected, _, _ = conversations([folder], tmp_path / "out", words)
    assert [row["id"] for row in rows] == ["a.jsonl.gz:1", "b.parquet:1", "b.parquet:2", "d.jsonl.gz:1"]
    assert rows[1]["messages"][1]["tool_calls"] == [call("f", {"x": 1})] and "tools" not in rows[2]
    assert [(r["file"], r["reason"]) for r in rejected] == [
        ("c.parquet", "damaged Parquet file"), ("d.jsonl.gz", "damaged compressed file"), ("e.parquet", "text that is not UTF-8"),
        ("f.parquet", "damaged Parquet file")]  # fmt: skip
    module = load("data.conversations")

    def identity(path):
        return module.external(parse(module.Config, {"sources": [str(path)]}, ""))

    before = identity(folder)
    folder.rename(tmp_path / "moved")
    assert identity(tmp_path / "moved") == before
    (tmp_path / "moved" / "a.jsonl.gz").write_bytes(gzip.compress(line(GOOD[1])))
    assert identity(tmp_path / "moved") != before


def test_refusals_name_file_line_and_the_way_out(tmp_path, words, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n' * 3 + json.dumps(GOOD[0]))
    with pytest.raises(CuveeError, match=r"3 of 4 lines are refused, most often: messages: expected .* \(first bad.jsonl:1\).*max_rejected"):
        conversations([tmp_path / "bad.jsonl"], tmp_path / "a", words)
    with pytest.raises(CuveeError, match="nowhere.jsonl does not exist"):
        conversations([tmp_path / "nowhere.jsonl"], tmp_path / "b", words)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(CuveeError, match="x.txt holds no file of .jsonl"):
        conversations([tmp_path / "x.txt"], tmp_path / "c", words)
    with pytest.raises(ConfigError, match="sources: is empty"):
        conversations([], tmp_path / "d", words)
    # A template without {% generation %} would train on nothing: that is no fault of one line.
    broken = AutoTokenizer.from_pretrained(words.path)
    broken.chat_template = broken.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    broken.save_pretrained(tmp_path / "broken")
    (tmp_path / "good.jsonl").write_text(json.dumps(GOOD[0]))
    with pytest.raises(CuveeError, match="data.conversations: good.jsonl:1: messages: no token would be trained on"):
        conversations([tmp_path / "good.jsonl"], tmp_path / "e", artifact(tmp_path / "broken", Kind.TOKENIZER))


def test_parts_and_thinking_are_kept():
    row = conversation({"messages": [user("q"), assistant([{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}], thinking=None)]})
    assert row["messages"][1]["content"][0] == {"type": "thinking", "thinking": "t"} and "thinking" not in row["messages"][1]
    texts = [{"type": "text", "text": one} for one in "ab"]
    assert conversation({"messages": [user(texts), assistant("c")]})["messages"][0] == user("a\nb"), "for templates without parts"
    with pytest.raises(Refused, match="thinking: expected a text"):
        conversation({"messages": [user("q"), assistant("a", thinking=3)]})


@pytest.mark.parametrize(("cited", "there"), [
    ("0:[1]", True), ("0:[2]", False), ("1:[0]", True), ("1:[0,1]", True), ("1:[2]", False), ("2:[0],0:[0,1]", True), ("2:[1]", False),
    ("3:[0]", False), ("see above", True),
])  # fmt: skip
def test_citations_are_of_what_is_there(cited, there):
    """Documents are call 0; the answers to calls 1 and 2 come in the other order."""
    calls = [call("f", {}, id="a"), call("f", {}, id="b")]
    results = [{"role": "tool", "tool_call_id": i, "content": content} for i, content in (("b", "one"), ("a", [{"x": 1}, {"x": 2}]))]
    record = {"messages": [user("q"), assistant("", tool_calls=calls), *results, assistant(f"<co>s</co: {cited}>")],
              "tools": [TOOL], "documents": [{"text": "d"}, {"text": "e"}]}  # fmt: skip
    if there:
        assert conversation(record)["messages"][-1]["content"] == f"<co>s</co: {cited}>"
    else:
        with pytest.raises(Refused, match="citations: of a document or result that is not there"):
            conversation(record)


def test_advice_follows_the_size_of_the_data():
    found = [advice(n) for n in (0, 499, 500, 999, 1000, 10**6)]
    assert [f["batch_groups"] for f in found] == [10, 10, 24, 24, 48, 48]
    assert [f["lr_multiplier"] for f in found] == [10 / 32, 10 / 32, 0.75, 0.75, 1.0, 1.0]


def stage(values, folder, **inputs):
    config = parse(sft.Config, {**COMMON, **values}, "sft")
    sft.check(config, inputs)
    folder.mkdir(parents=True, exist_ok=True)
    return sft.run(config, inputs, folder, context(folder.with_name(folder.name + "-scratch")))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return artifact(save_checkpoint(tmp_path_factory.mktemp("start"), std=0.1), Kind.CHECKPOINT)


def own(path, rows):
    jsonl(path / "train.jsonl", [{"id": f"c:{i}", **row} for i, row in enumerate(rows)])
    return artifact(path, Kind.CONVERSATIONS)


def stream(start, conversations, tmp_path, prompts=None, **values):
    config = parse(sft.Config, {**COMMON, **values}, "sft")
    inputs = {"conversations": conversations} | ({"prompts": prompts} if prompts else {})
    sft.check(config, inputs)
    return sft.Conversations(config, inputs, AutoTokenizer.from_pretrained(start.path), context(tmp_path / "ctx"))


def targets(tokenizer, groups):
    return {tokenizer.decode(s.tokens[s.mask > 0]) for (s,) in groups}


def test_all_turns_or_the_last_are_learned_beside_generated_prompts(start, tmp_path):
    chats = {"user": own(tmp_path / "user", [{"messages": [user("q"), assistant("one"), user("r"), assistant("two")]}])}
    jsonl(tmp_path / "prompts" / "train.jsonl", [{"id": "p", "domain": "math", "messages": [user("p")], "answer": "three"}])
    prompts = {"math": artifact(tmp_path / "prompts", Kind.PROMPTS)}
    end = "<|END_OF_TURN_TOKEN|>"
    found = stream(start, chats, tmp_path, prompts, steps=1, batch_groups=40)
    assert targets(found.tokenizer, found.batch(0, None)) == {f"one{end}two{end}", f"three{end}"}
    found = stream(start, chats, tmp_path, prompts, steps=1, batch_groups=40, turns="last")
    assert targets(found.tokenizer, found.batch(0, None)) == {f"two{end}", f"three{end}"}
    found = stream(start, chats, tmp_path, prompts, steps=1, batch_groups=40, mix={"user": 1.0})
    assert targets(found.tokenizer, found.batch(0, None)) == {f"one{end}two{end}"}
    for inputs, reason in (
        ({"conversations": {"math": chats["user"]}, "prompts": prompts}, "a name in common"),
        ({}, "give the inputs `prompts`"),
        ({"conversations": chats, "pairs": prompts["math"]}, "alone"),
    ):
        with pytest.raises(ConfigError, match=reason):
            sft.check(sft.Config(), inputs)


def test_a_row_without_targets_is_an_error_with_its_place(start, tmp_path):
    found = stream(start, {"user": own(tmp_path / "user", [{"messages": [user("q")]}])}, tmp_path, steps=1, batch_groups=1)
    with pytest.raises(CuveeError, match="c:0: messages: no token would be trained on"):
        found.batch(0, None)


def test_sft_learns_a_tool_call_from_conversations(start, tmp_path):
    """From files to a model that calls the tool it was shown."""
    rows = [{"messages": [user(f"go {i}"), assistant("", tool_calls=[call("f", {})])], "tools": [TOOL]} for i in range(4)]
    (tmp_path / "chats.jsonl").write_bytes(b"\n".join(map(line, rows)))
    words = artifact(start.path, Kind.TOKENIZER)
    conversations([tmp_path / "chats.jsonl"], tmp_path / "conversations", words)
    chats = {"user": artifact(tmp_path / "conversations", Kind.CONVERSATIONS)}
    values = {"steps": 70, "batch_groups": 4, "lr": 0.02, "sequence_length": 256}
    metrics = stage(values, tmp_path / "out", init=start, conversations=chats)
    assert metrics["loss"] < 0.1 * metrics["loss_first"]
    metrics = stage({**values, "steps": 1, "batch_groups": 1, "by_size": True}, tmp_path / "sized", init=start, conversations=chats)
    points = [json.loads(one) for one in (tmp_path / "sized-scratch" / "metrics.jsonl").read_text().splitlines()]
    assert points[0]["lr"] == pytest.approx(0.02 * 10 / 32)
    from stages.chat.render import render_row
    from stages.rollout.engines.transformers import Engine

    engine = Engine(tmp_path / "out", context(tmp_path / "engine"))
    prompt = render_row(engine.tokenizer, {"messages": rows[3]["messages"][:1], "tools": [TOOL]}, generation=True).ids
    ((made,),) = engine.generate([prompt], n=1, max_new_tokens=80, temperature=0.0, seed=0, stop=[engine.tokenizer.eos_token_id])
    assert made.text == '<|START_ACTION|>\n{"tool_call_id": "0", "tool_name": "f", "parameters": {}}<|END_ACTION|>'


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


class Killed(Exception):
    pass


def test_the_anchor_pulls_back_to_the_parent_and_resumes_bit_for_bit(start, tmp_path, monkeypatch):
    chats = {"user": own(tmp_path / "user", [{"messages": [user(str(i)), assistant(str(i))]} for i in range(8)])}
    values = {"steps": 6, "batch_groups": 4, "lr": 0.01, "save_every": 2}
    first = weights_of(start.path)

    def distance(name):
        return sum(float((w - first[key]).pow(2).sum()) for key, w in weights_of(tmp_path / name).items())

    for name, anchor, dropout in (("free", 0.0, 0.0), ("held", 20.0, 0.1), ("whole", 20.0, 0.1)):
        stage({**values, "anchor": anchor, "dropout": dropout}, tmp_path / name, init=start, conversations=chats)
    assert distance("held") < 0.7 * distance("free")
    batch = sft.Conversations.batch

    def die(self, step, trainer):
        if step == 4:
            raise Killed
        return batch(self, step, trainer)

    monkeypatch.setattr(sft.Conversations, "batch", die)
    with pytest.raises(Killed):
        stage({**values, "anchor": 20.0, "dropout": 0.1}, tmp_path / "parts", init=start, conversations=chats)
    monkeypatch.setattr(sft.Conversations, "batch", batch)
    stage({**values, "anchor": 20.0, "dropout": 0.1}, tmp_path / "parts", init=start, conversations=chats)
    for name in ("held", "parts"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_dropout_is_of_steps_alone_and_keeps_the_mean():
    from stages.objectives import ce
    from stages.trainer.trainer import Trainer
    from tests.resume.trainer_run import SIZES, Counting, config

    found = []
    for dropout in (0.0, 0.3):
        trainer = Trainer(config(dropout=dropout), SIZES, lambda b: ce.loss(b, ce.Config()))
        groups = Counting().batch(0, trainer)
        before = trainer.logprobs(groups)
        steps = [(torch.manual_seed(seed), trainer.step(groups, 0.0))[1] for seed in (0, 1, 0)]
        found.append([(step["loss"], step["grad_norm"]) for step in steps])
        assert all(np.array_equal(a, b) for a, b in zip(before, trainer.logprobs(groups), strict=True)), "lr 0, and nothing dropped"
    free, dropped = found
    assert len(set(free)) == 1 and dropped[0] == dropped[2] != dropped[1] and free[0] != dropped[0]
    assert dropped[0][0] == pytest.approx(free[0][0], rel=0.05)
    with pytest.raises(ConfigError, match="dropout: 1.0 is no share"):
        config(dropout=1.0).check()


def test_the_plan_counts_the_anchor():
    from stages.trainer.config import TrainConfig
    from stages.trainer.layout import memory
    from tests.resume.trainer_run import SIZES

    for values in ({}, {"fsdp": True}, {"distributed_optimizer": True}):
        free, held = (memory(TrainConfig(**values, anchor=anchor), SIZES, 2) for anchor in (0.0, 1.0))
        assert held.optimizer == free.optimizer * 12 / 8 and held.weights == free.weights


def test_the_anchor_is_the_published_step():
    """Without gradient and momentum a step only goes back: w + lr * anchor * (w0 - w), norms included."""
    from stages.objectives import ce
    from stages.trainer.batch import Loss
    from stages.trainer.trainer import Trainer
    from tests.resume.trainer_run import SIZES, Counting, config

    config = config(beta1=0.0, weight_decay=0.0, clip_grad=0.0, anchor=30.0)
    mute = []
    trainer = Trainer(config, SIZES, lambda b: Loss(b.logprobs.sum() * 0, b.mask.sum()) if mute else ce.loss(b, ce.Config()))
    states = [trainer.hf_state()]
    for lr in (0.01, 0.02):
        trainer.step(Counting().batch(0, trainer), lr)
        states.append(trainer.hf_state())
        mute.append(True)
    for key, (w0, w1, w2) in {key: [state[key] for state in states] for key in states[0]}.items():
        assert not torch.equal(w0, w1)
        np.testing.assert_allclose(w2.numpy(), (w1 + 0.02 * 30 * (w0 - w1)).numpy(), atol=1e-6, err_msg=key)
