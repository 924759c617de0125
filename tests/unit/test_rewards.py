"""The programmatic rewards: shape, order, and what they look at."""

import pytest

from stages import stage
from stages.rewards import length, overlong, repetition, verifier

MATH = {"domain": "math", "check": {"number": 7}, "answer": "3 + 4 = 7", "messages": []}
CODE = {"domain": "code", "check": {"tests": [[f"f({i})", str(i + 1)] for i in range(4)]}, "answer": "x", "messages": []}
BLOCK = "```python\ndef f(x):\n    return {}\n```"


@pytest.mark.parametrize("name", [n for n in stage.names("rewards") if n not in ("reward_model", "overlong")])
def test_interface(name):
    reward = stage.resolve("rewards", name).Reward(None, None)
    found = reward([MATH, CODE], [["7", "8", ""], [BLOCK.format("x")]])
    assert [len(row) for row in found] == [3, 1] and all(-1.0 <= r <= 1.0 for row in found for r in row)
    assert reward([], []) == []


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
