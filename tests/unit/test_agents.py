"""Agents' tools and retrieval: what they give, how calls are judged, and that every chat template writes the rows."""

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stages import stage
from stages.chat.messages import said
from stages.chat.render import render_row, response
from stages.chat.template import TEMPLATE, special
from stages.data import prompts
from stages.rewards import citation, schema
from stages.tasks import _tools, rag
from stages.tasks._retrieval import Chunk, Index, chunks
from tests.unit.test_tasks_options import TALES


def test_chunks_are_whole_sentences_with_the_begin_of_their_text():
    text = "One is here. Two is there!  Three\nFour and a very long sentence which is longer than a chunk. Five."
    found = chunks(text, 30)
    assert [c.text for c in found] == [
        "One is here. Two is there!",
        "Three",
        "Four and a very long sentence which is longer than a chunk.",
        "Five.",
    ]
    assert [c.context for c in found] == ["", *["One is here. Two is there!"] * 3] and chunks("", 10) == []


def test_retrieval_fuses_words_and_forms():
    """BM25 alone misses another form of a word, the trigrams find it; a context finds a chunk that doesn't say its subject."""
    texts = ["The baker sells bread.", "Gardening is a pleasure.", "A river flows to the sea.", "It costs nine coins."]
    index = Index([Chunk(t) for t in texts[:3]] + [Chunk(texts[3], "About the velvet hat.")])
    assert index.search("What does the baker sell?", 1) == [0]
    assert index.search("gardens", 1) == [1] and index.search("rivers and seas", 1) == [2]
    assert index.search("the hat of velvet", 1) == [3] and index.search("qqq", 3) == []
    assert Index([]).search("x", 3) == []


def test_tools_run_and_refuse():
    texts = ["The red box holds a key.", "The blue box is in the hall."]
    assert _tools.run("search", {"query": "red box"}, texts)[0] == texts[0]
    assert _tools.run("calculate", {"expression": "2 * (3 + 4) - -1"}, []) == ["15"]
    assert _tools.run("calculate", {"expression": "7 / 2"}, []) == ["3.5"]
    assert _tools.run("days_between", {"start": "2024-02-28", "end": "2024-03-01"}, []) == ["2 days"]
    assert _tools.run("weekday", {"date": "2024-02-29"}, []) == ["Thursday"]
    assert _tools.run("convert_weight", {"amount": 2, "unit": "pound", "into": "gram"}, []) == ["907.18474 gram"]
    for name, arguments in (
        ("shell", {}), ("search", {}), ("search", {"query": 3}), ("search", {"query": "x", "more": 1}), ("weekday", {"date": "2024-02-30"}),
        *(("calculate", {"expression": e}) for e in ("1 / 0", "2 ** 9", "__import__('os')", "(", "x", "9 and 3", "'a' * 9", "-" * 190 + "1" + ")")),
        ("convert_weight", {"amount": 1, "unit": "stone", "into": "gram"}),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            _tools.run(name, arguments, texts)


def test_calls_are_read_in_all_forms():
    one = [("weekday", {"date": "2024-01-01"})]
    assert _tools.calls('[{"tool_call_id": "0", "tool_name": "weekday", "parameters": {"date": "2024-01-01"}}]') == one
    assert _tools.calls('I look.\n{"name": "weekday", "arguments": {"date": "2024-01-01"}} ') == one
    assert _tools.calls('{"tool_name": "a", "parameters": {}}\n{"tool_name": "b", "parameters": {}}') == [
        ("a", {}),
        ("b", {}),
    ]
    assert _tools.calls('Thought: x\nAction: weekday\nAction Input: {"date": "2024-01-01"}') == one
    assert _tools.calls("Action: weekday\nAction Input: today") == [("weekday", {})]
    assert _tools.calls("No call, but [1] and {x}.") is None and _tools.calls('[{"name": 3}]') is None


def rows(form, count=120):
    return rag.generate(
        random.Random(5), count, TALES, stage.parse(rag.Options, {"kinds": ["agent"], "form": form}, "x")
    )


@pytest.mark.parametrize("form", rag.FORMS)
def test_turns_of_an_agent(form):
    made = rows(form)
    calling = [p for p in made if "calls" in p["check"]]
    assert 20 < len(calling) < 100 and any(len(p["check"]["calls"]) > 1 for p in calling), "parallel calls"
    assert any(not p["check"].get("span") for p in made if p not in calling), "questions that nothing answers"
    for one in calling:
        assert rag.verify(one, "The answer is 7.") == -0.5
        assert rag.verify(one, 'Action: shell\nAction Input: {"x": 1}') == 0.0
        assert rag.verify(one, 'Action: weekday\nAction Input: {"date": "1999-01-01"}') in (0.25, 1.0)
    finals = [p for p in made if p["check"].get("span")]
    for one in finals:
        span, (call, result) = one["check"]["span"], one["check"]["cites"]
        assert rag.verify(one, f"<co>{span}</co: {call}:[{result + 1}]>") == 0.5
        assert (
            rag.verify(one, f"It is {span}.") == 0.0 == rag.verify(one, 'Action: search\nAction Input: {"query": "x"}')
        )
    judged = citation.Reward()(finals, [[p["answer"]] for p in finals])
    assert judged == [[1.0]] * len(finals), "each cited result says the span"
    assert schema.Reward()(calling, [[p["answer"]] for p in calling]) == [[1.0]] * len(calling)


def test_another_wording_of_a_search_is_as_good():
    texts = ["The red box holds a key.", "The blue bag costs 3 coins.", "The cat sleeps."]
    one = {
        "messages": [],
        "check": {"kind": "agent", "texts": texts, "calls": [["search", {"query": "the red box holds"}]]},
    }
    ask = 'Action: search\nAction Input: {{"query": "{}"}}'
    assert (
        rag.verify(one, ask.format("what is in the red box?")) == 1.0
        and rag.verify(one, ask.format("sleeping cat")) == 0.25
    )
    assert rag.verify(one, ask.format("red box") + "\n" + ask.format("red box")) == 0.25, "one call too many"


def bytes_tokenizer(template):
    own, alphabet = special(template), sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*own.tokens, *alphabet])}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(list(own.tokens))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=own.bos, eos_token=own.end_of_turn, pad_token=own.pad, unk_token=own.unk,
        chat_template=TEMPLATE[template],
    )  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATE)
@pytest.mark.parametrize("form", rag.FORMS)
def test_templates_write_the_rows_and_the_verifier_reads_what_they_write(template, form):
    tokenizer = bytes_tokenizer(template)
    for one in rows(form, 16):
        prompt = render_row(tokenizer, one, generation=True).ids
        whole = render_row(tokenizer, one, one["answer"], turns="last").ids
        assert whole[: len(prompt)] == prompt
        completion = tokenizer.decode(whole[len(prompt) :])
        assert rag.verify(one, response(completion)) == 1.0, completion
        if "reply" in one:
            assert ("<tool_call>" if template == "chatml" else "<|START_ACTION|>") in completion


def test_a_turn_as_text():
    """What the tokenizer is trained on and what reports show."""
    call = {"id": "0", "type": "function", "function": {"name": "search", "arguments": {"query": "é"}}}
    assert said({"role": "user", "content": "a"}) == "a" and said({"role": "assistant"}) == ""
    assert (
        said({"role": "tool", "content": [{"type": "text", "text": "a"}, {"document": 1}, "b"]})
        == 'a\n{"document": 1}\nb'
    )
    assert (
        said({"role": "assistant", "content": "", "tool_calls": [call]})
        == '{"name": "search", "arguments": {"query": "é"}}'
    )


def test_the_same_question_on_other_documents_is_another_prompt(tmp_path):
    few = {"form": "template", "facts": 2, "relations": 1, "things": 3, "values": 3, "noise": 0, "unanswerable": 0.0}
    config = stage.parse(prompts.Config, {"domain": "rag", "train": 60, "heldout": 20, "options": few}, "x")
    import pyarrow as pa
    import pyarrow.parquet as parquet

    for split in ("train", "heldout"):
        parquet.write_table(pa.Table.from_pylist(TALES), tmp_path / f"{split}-00000.parquet")
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir(), scratch.mkdir()
    corpus = stage.Artifact(tmp_path, stage.Kind.CORPUS, "c", {})
    assert prompts.run(config, {"corpus": corpus}, out, stage.Context(scratch)) == {
        "train": 60,
        "heldout": 20,
        "rejected": 0,
    }
    made = {s: [json.loads(line) for line in open(out / f"{s}.jsonl")] for s in ("train", "heldout")}
    keys = {s: {json.dumps([p["messages"], p["documents"]]) for p in made[s]} for s in made}
    assert len(keys["train"]) == 60 and not keys["train"] & keys["heldout"]
    assert len({p["messages"][0]["content"] for p in made["train"]}) < 60
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(json.dumps(p) for p in rows("template", 20)))
    out, scratch = tmp_path / "own", tmp_path / "own-scratch"
    out.mkdir(), scratch.mkdir()
    config = stage.parse(prompts.Config, {"domain": "rag", "train": 0, "heldout": 0, "files": [str(own)]}, "x")
    assert prompts.run(config, {"corpus": corpus}, out, stage.Context(scratch)) == {
        "train": 20,
        "heldout": 0,
        "rejected": 0,
    }
    assert [json.loads(line)["tools"] for line in open(out / "train.jsonl")] == [
        p["tools"] for p in rows("template", 20)
    ]
