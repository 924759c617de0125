"""The programmatic rewards: shape, order, and what they look at."""

import pytest

from stages import stage
from stages.rewards import length, overlong, repetition, verifier
from stages.rewards._common import refuse_idle
from stages.stage import CuveeError
from stages.tasks import _tools

MATH = {"domain": "math", "check": {"number": 7}, "answer": "3 + 4 = 7", "messages": []}
CODE = {"domain": "code", "check": {"tests": [[f"f({i})", str(i + 1)] for i in range(4)]}, "answer": "x", "messages": []}
BLOCK = "```python\ndef f(x):\n    return {}\n```"


@pytest.mark.parametrize("name", [n for n in stage.names("rewards") if n not in ("reward_model", "overlong")])
def test_interface(name):
    """A value in [-1, 1] a completion, or None for all of a prompt that the reward has nothing to say of."""
    reward = stage.resolve("rewards", name).Reward(None, None)
    found = reward([MATH, CODE], [["7", "8", ""], [BLOCK.format("x")]])
    assert [len(row) for row in found] == [3, 1]
    for prompt, row in zip((MATH, CODE), found, strict=True):
        if not getattr(reward, "applies", lambda _: True)(prompt):
            assert row == [None] * len(row)
        else:
            assert all(r is None or -1.0 <= r <= 1.0 for r in row)
    assert reward([], []) == []


def rewarded(name, prompt, *texts):
    prompt = {"domain": "x", "messages": [], "answer": "", "check": {}, **prompt}
    return stage.resolve("rewards", name).Reward()([prompt], [list(texts)])[0]


def test_a_reward_that_would_do_nothing_is_refused():
    refuse_idle(["verifier", "math_answer", "unit_tests", "length", "overlong", "reward_model"], [MATH, CODE])
    with pytest.raises(CuveeError, match="rewards: language applies to none of the 2 prompts of code, math"):
        refuse_idle(["verifier", "language"], [MATH, CODE])


def test_unit_tests_and_answers_of_any_domain():
    assert rewarded("unit_tests", {"check": CODE["check"]}, BLOCK.format("x + 1"), BLOCK.format("1"), "no") == [1.0, 0.25, -1.0]
    assert rewarded("math_answer", {"check": {"number": 7}}, "so 7", "so 8", "so") == [1.0, 0.0, -0.5]
    assert rewarded("math_answer", {"check": {"value": "\\frac{1}{2}"}}, "\\boxed{0.5}", "Answer: 2", "2") == [1.0, 0.0, -0.5]


def test_constraints_are_a_share():
    check = {"constraints": [["punctuation:no_comma", {}], ["startend:quotation", {}]]}
    assert rewarded("constraints", {"check": check}, '"a"', '"a, b"', "a, b", "") == [1.0, 0.5, 0.0, 0.0]


def test_language_is_judged_where_there_is_enough_of_it():
    german, english = "Die Katze liegt am Fenster und schläft.", "The cat lies at the window and sleeps."
    assert rewarded("language", {"check": {"language": "de"}}, german, english, "ja", "...") == [1.0, -1.0, None, -1.0]
    assert rewarded("language", {"check": {"language": "de"}, "answer": german}, german, "ja", "") == [1.0, -1.0, -1.0], "no way out"


def test_refusals_and_over_refusals():
    texts = ("I can't help with that.", "Here is how to do it.", "", "1.")
    assert rewarded("refusal", {"check": {"refuse": True}}, *texts) == [1.0, -1.0, -1.0, -1.0]
    assert rewarded("refusal", {"check": {"refuse": False}}, *texts) == [-0.5, 1.0, -1.0, -1.0]


CITED = ("The cat is <co>black</co: 0:[1]>.", "The cat is <co>black</co: 0:[0]>.", "<co>green</co: 0:[1]>", "<co>black</co: 0:[7]>",
         "Black.", "<co>black</co: 0:[1]> and <co>white</co: 0:[0]>")  # fmt: skip


@pytest.mark.parametrize("where", ["text", "template"])
def test_citations_are_of_what_the_source_says(where):
    documents = ["The dog is white.", "The cat is black."]
    turn = {"role": "user", "content": "\n".join(f"[{i}] {d}" for i, d in enumerate(documents)) if where == "text" else "q"}
    row = {"messages": [turn], **({} if where == "text" else {"documents": [{"text": d} for d in documents]})}
    assert rewarded("citation", row | {"check": {"source": 1}}, *CITED) == [1.0, -1.0, -1.0, -1.0, 0.0, pytest.approx(2 / 3)]
    assert rewarded("citation", row | {"check": {"source": -1}}, *CITED[:1], "It is not said.", "") == [0.0, 1.0, -1.0]
    assert rewarded("citation", row | {"check": {"calls": []}}, *CITED[:1]) == [None], "a turn that is to call tools"
    assert rewarded("citation", row, *CITED) == [1.0, -1.0, -1.0, -1.0, 0.0, 1.0], "any grounded one, where no source is named"
    assert rewarded("citation", {"messages": [{"role": "user", "content": "no documents"}]}, "x") == [None]


def test_citations_of_tools_count_calls_over_the_conversation():
    tool = lambda call, *texts: {"role": "tool", "tool_call_id": call, "content": [{"type": "text", "text": t} for t in texts]}  # noqa: E731
    calls = [{"id": name, "type": "function", "function": {"name": "search", "arguments": {}}} for name in "ab"]
    one, two = tool("a", "one red box"), tool("b", "no", "two blue boxes")
    for results in ((one, two), (two, one)):  # whichever came first
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
        row = {"messages": turns, "check": {"cites": [1, 1]}}
        assert rewarded("citation", row, "<co>two</co: 1:[1]>", "<co>two</co: 0:[0]>", "<co>red</co: 0:[0]>") == [1.0, -1.0, 0.0]
    react = {"messages": [{"role": "user", "content": "Observation 0: [0] one red box\nObservation 1: [0] no [1] two blue boxes"}]}
    assert rewarded("citation", react, "<co>two</co: 1:[1]>", "<co>two</co: 1:[0]>") == [1.0, -1.0]


def test_json_fits_its_schema():
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    found = rewarded("schema", {"check": {"schema": schema}}, 'So: ```json\n{"n": 3}\n```', '{"n": "3"}', "[]", "n = 3", '{"n": 3')
    assert found == [1.0, 0.0, 0.0, -1.0, -1.0]


@pytest.mark.parametrize("schema", [{"type": "integr"}, {"properties": 3}, {"properties": {"n": {"pattern": "("}}}, {"required": "n", "properties": [1]}])
def test_a_schema_that_is_none_is_told(schema):
    with pytest.raises(CuveeError, match="a prompt's JSON schema .* is none: "):
        rewarded("schema", {"check": {"schema": schema}}, '{"n": "x"}', '["x"]')


def test_calls_fit_their_tools():
    row = {"tools": [_tools.schema("calculate"), _tools.schema("weekday")]}
    good = '[{"tool_call_id": "0", "tool_name": "calculate", "parameters": {"expression": "1 + 1"}}]'
    texts = (good, good.replace("calculate", "search"), good.replace("expression", "text"), good.replace('"1 + 1"', "2"), "Two.",
             'Action: weekday\nAction Input: {"date": "2024-01-31"}', 'Action: weekday\nAction Input: {"date": "today"}')  # fmt: skip
    assert rewarded("schema", row, *texts) == [1.0, 0.0, 0.0, 0.0, None, 1.0, 0.0]
    assert rewarded("schema", row | {"check": {"calls": [["weekday", {}]]}}, "Two.") == [-1.0]
    assert rewarded("schema", row | {"check": {"span": "two"}}, good, "Two.") == [0.0, None], "an answer is due"


def test_verifier_dispatches_by_domain_and_keeps_the_order():
    end = "<|END_OF_TURN_TOKEN|>"
    prompts = [MATH, CODE, MATH, CODE]
    completions = [["7", "8"], [BLOCK.format("x + 1"), "no"], [f"<|START_RESPONSE|>7<|END_RESPONSE|>{end}9"], [BLOCK.format("1")]]
    assert verifier.Reward()(prompts, completions) == [[1.0, 0.0], [1.0, -1.0], [1.0], [0.25]]


def test_length_is_free_up_to_the_answer_and_falls_to_minus_one():
    prompt = {"answer": "x" * 100}
    found = length.Reward()([prompt], [["x" * 100, "x" * 250, "x" * 400, "x" * 4000, ""]])[0]
    assert found == [0.0, -0.5, -1.0, -1.0, 0.0]


def test_repetition_is_the_share_of_repeated_trigrams():
    assert repetition.Reward()([MATH], [["a b c d e", "a a a a a a", "a b", "a b c a b c"]])[0] == [0.0, -0.75, 0.0, -0.25]


def test_overlong_falls_in_the_last_fifth_of_the_budget():
    """DAPO's example: 20480 tokens with a cache of 4096, of which 2000 are used: -.488."""
    assert overlong.penalty(18384, 20480, 4096) == pytest.approx(-0.488, abs=5e-4)
    found = overlong.Reward().of_tokens([[[1] * n for n in (1, 16384, 18432, 20480)], [[1] * 30000]], 20480)
    assert found == [[0.0, 0.0, -0.5, -1.0], [-1.0]]
