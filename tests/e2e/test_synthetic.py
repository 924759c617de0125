"""Instruct learns what teachers write: `cuvee run` against an OpenAI-compatible server on loopback."""

import json
import re

import pytest

from tests.e2e.test_recipe import EXPERTS, cuvee, records
from tests.unit.stub_server import serving

SMALL = ("run", "scale=micro", EXPERTS, "recipe.also=[]", "synthetic.prompts=12", "synthetic.mix={math: 1.0}", "pretrain.steps=4", "cooldown.steps=2",
         "cooldown.phases=[[256,2]]", "cooldown.long_every=0", "instruct.steps=2")  # fmt: skip


@pytest.fixture
def server():
    """(address, bodies asked) of `good`, which solves the stories, and of `endless`, which is cut off in a turn that it never ends."""
    bodies = []

    def answer(asked):
        body = json.loads(asked.body)
        bodies.append(body)
        story = body["messages"][-1]["content"]
        a, b = map(int, re.findall(r"\d+", story))
        good, less = body["model"] == "good", re.search("loses|gives away|sells|breaks|takes", story)
        text = f"That makes {a - b if less else a + b}" if good else "apples " * body["max_tokens"]
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop" if good else "length"}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": 50, "completion_tokens": 4}}, {}

    with serving(answer) as address:
        yield address, bodies


def teachers(address, *names):
    made = {name: {"model": name, "url": f"{address}/v1", "max_tokens": 16, "output_price": 10.0} for name in names}
    return "synthetic.teachers=" + json.dumps(made).replace('"', "")


def test_instruct_learns_the_best_answers(tmp_path, server):
    home, (address, asked) = tmp_path, server
    cuvee(home, *SMALL, teachers(address, "good", "endless"), "--until", "instruct")
    made = records(home)
    own, folder = made["synthetic"], home / "state/store/artifacts" / made["synthetic"]["fingerprint"]
    assert own["metrics"]["conversations"] == 12 and own["metrics"]["chosen/good"] == 1.0 and own["metrics"]["reward"] == 1.0
    assert own["metrics"]["cut_off"] == 0.5, "the answers of `endless`, which nothing learns from"
    assert own["metrics"]["cost"] == pytest.approx(24 * 4 * 10 / 1e6)
    rows = [json.loads(line) for line in open(folder / "train.jsonl")]
    assert len(rows) == 12 and all(row["messages"][-1]["content"].startswith("That makes ") and row["teacher"] == "good" for row in rows)
    assert made["instruct"]["inputs"]["conversations"]["synthetic"]["fingerprint"] == own["fingerprint"]
    assert len(asked) == 24
