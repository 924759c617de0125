"""A user's preferences become pairs: every form that data sets have, refusals by line, and what is trained on them prefers them."""

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from post_helpers import COMMON, artifact, context, run
from tiny import jsonl
from transformers import AutoTokenizer

from flows.config import compose
from flows.graph import Graph
from stages.rollout._collect import answer_ids, render_prompt
from stages.stage import ConfigError, CuveeError, Kind, load, parse
from stages.train._groups import Grouper


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


ASKED = [user("2+2?")]
PAIR = {"messages": ASKED, "completions": ["4", "5"], "rewards": [1.0, 0.0]}
GOOD = [  # record, row
    ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, PAIR),
    ({"prompt": ASKED, "chosen": [assistant("4")], "rejected": [assistant("6")]}, PAIR | {"completions": ["4", "6"]}),
    ({"chosen": [*ASKED, assistant("4")], "rejected": [*ASKED, assistant("7")]}, PAIR | {"completions": ["4", "7"]}),
    ({"prompt": "of ultrafeedback", "chosen": [*ASKED, assistant("4")], "rejected": [*ASKED, assistant("8")]},
     PAIR | {"completions": ["4", "8"]}),
    ({"messages": ASKED, "completions": ["4", "5", "four"], "rewards": [5, 1, 4.5], "safety_mode": "STRICT"},
     {"messages": ASKED, "completions": ["4", "5", "four"], "rewards": [5.0, 1.0, 4.5], "safety_mode": "STRICT"}),
    ({"messages": [user("hi"), assistant("hello"), user("2+2?")], "chosen": assistant("4"), "rejected": "5"},
     PAIR | {"messages": [user("hi"), assistant("hello"), user("2+2?")]}),
]  # fmt: skip
BAD = [  # record or line, reason
    ("{not json", "no JSON in UTF-8"),
    ("[1]", "no JSON object"),
    ({"prompt": "q", "chosen": "4"}, "expected chosen and rejected, or completions"),
    ({"prompt": "q", "completions": ["4"], "rewards": [1]}, "expected chosen and rejected, or completions"),
    ({"prompt": "q", "completions": ["4", "5"], "rewards": [1]}, "rewards: expected a finite number for each"),
    ('{"prompt": "q", "completions": ["4", "5"], "rewards": [1, NaN]}', "rewards: expected a finite number for each"),
    ({"prompt": "q", "completions": ["4", "5"], "rewards": ["1", "2"]}, "rewards: expected a finite number for each"),
    ({"chosen": [user("a"), assistant("4")], "rejected": [user("b"), assistant("5")]}, "the answers are to different prompts"),
    ({"prompt": "q", "chosen": "", "rejected": "5"}, "messages: an assistant's message without content"),
    ({"chosen": "4", "rejected": "5"}, "messages: the first one after the system message must be the user's"),
    ({"prompt": "q", "chosen": [assistant("4", thinking="hm")], "rejected": "5"}, "the answers: expected texts"),
    ({"prompt": "q", "chosen": "<|USER_TOKEN|>", "rejected": "5"}, "the chat template refuses it"),
    ('{"prompt": "\\ud83d", "chosen": "4", "rejected": "5"}', "lone surrogate in the text"),
    (GOOD[0][0], "the same preference stands on an earlier line"),
]  # fmt: skip


def made(sources, out, words, **values):
    """(folder of the stage's artifact, its metrics)."""
    module = load("data.preferences")
    config = parse(module.Config, {"sources": [str(s) for s in sources], **values}, "preferences")
    module.check(config, {})
    out.mkdir()
    return out, module.run(config, {"tokenizer": words}, out, context(out.with_name(out.name + "-scratch")))


def rows(folder, name="samples"):
    return [json.loads(one) for one in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def words(start):
    return artifact(start.path, Kind.TOKENIZER)


def test_every_line_is_kept_or_refused_with_its_reason(tmp_path, words):
    lines = [one if isinstance(one, str) else json.dumps(one) for one, _ in [*GOOD, *BAD]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    folder, metrics = made([tmp_path / "a.jsonl"], tmp_path / "out", words, max_rejected=0.9)
    kept, rejected = rows(folder), rows(folder, "rejected")
    assert [{k: v for k, v in row.items() if k not in ("id", "domain", "parts")} for row in kept] == [row for _, row in GOOD]
    assert [row["id"] for row in kept] == [f"a.jsonl:{i}" for i in range(1, len(GOOD) + 1)] and kept[0]["domain"] == "own"
    for (_, reason), told, number in zip(BAD, rejected, range(len(GOOD) + 1, 99), strict=False):
        assert told["reason"].startswith(reason) and told["line"] == number, told
    assert metrics == {"prompts": len(GOOD), "completions": 2 * len(GOOD) + 1, "rejected": len(BAD)}
    assert json.loads((folder / "report.json").read_text())["reasons"]["no JSON object"]["count"] == 1
    with pytest.raises(CuveeError, match=rf"data.preferences: {len(BAD)} of {len(GOOD) + len(BAD)} lines are refused, most often"):
        made([tmp_path / "a.jsonl"], tmp_path / "strict", words)


def test_parquet_has_the_same_rows(tmp_path, words):
    records = [record for record, _ in GOOD[:1] + GOOD[2:3]]
    parquet.write_table(pa.Table.from_pylist([records[0]]), tmp_path / "a.parquet")
    parquet.write_table(pa.Table.from_pylist([records[1]]), tmp_path / "b.parquet")
    folder, _ = made([tmp_path], tmp_path / "out", words)
    assert [row["completions"] for row in rows(folder)] == [["4", "5"], ["4", "7"]]


@pytest.fixture(scope="module")
def own(tmp_path_factory, words):
    """Odd digits are preferred, whatever a policy's samples are rewarded for."""
    folder = tmp_path_factory.mktemp("own")
    jsonl(folder / "own.jsonl", [{"prompt": f"Say {i}", "chosen": "1357"[i % 4], "rejected": "2468"[i % 3]} for i in range(60)])
    return artifact(made([folder / "own.jsonl"], folder / "out", words)[0], Kind.PAIRS)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled")
    jsonl(folder / "samples.jsonl", [
        {"id": str(i), "domain": "math", "messages": [user(f"Tell {i}")], "completions": ["0", "9"], "rewards": [0.0, 1.0], "parts": {}}
        for i in range(8)
    ])  # fmt: skip
    return artifact(folder, Kind.PAIRS)


def test_a_reward_model_learns_them_beside_the_sampled_pairs(start, sampled, own, tmp_path):
    values = {**COMMON, "steps": 40, "batch_groups": 16, "lr": 0.003, "max_epochs": 20, "heldout": 0.2}
    metrics = run("train.reward", values, tmp_path / "out", init=start, pairs=sampled, own=own)
    assert metrics["heldout_accuracy/own"] > 0.9 and metrics["pairs"] > 40
    with pytest.raises(ConfigError, match="elo: compares several raters"):
        run("train.reward", values | {"elo": True}, tmp_path / "elo", init=start, pairs=sampled, own=own)


def test_preference_training_takes_them_beside_the_sampled_pairs(start, sampled, own, tmp_path):
    values = {**COMMON, "steps": 20, "batch_groups": 16, "lr": 0.003, "objective": "dpo"}
    assert run("train.preference", values, tmp_path / "out", init=start, pairs=sampled, own=own)["prompts"] == 68
    assert gap(tmp_path / "out", own) > gap(start.path, own) + 0.3


def gap(model, pairs):
    """Mean log p(preferred) - log p(other), nats."""
    from stages.rollout.engines.transformers import Engine

    engine, found = Engine(model, context(model.parent / "engine")), []
    for row in rows(pairs.path)[:12]:
        prompt = render_prompt(engine.tokenizer, row)
        logprobs = engine.logprobs([prompt + answer_ids(engine.tokenizer, row, text) for text in row["completions"]])
        better, worse = (float(one[len(prompt) - 1 :].sum()) for one in logprobs)
        found.append(better - worse)
    return sum(found) / len(found)


def test_objectives_that_weigh_by_the_sampling_say_what_is_missing(start, own):
    tokenizer = AutoTokenizer.from_pretrained(start.path)
    with pytest.raises(CuveeError, match="own.jsonl:1: a completion has no log-probabilities of its sampling"):
        Grouper(tokenizer, "completions", 256, behaviour=True)(rows(own.path)[0])


def test_the_recipe_gives_them_to_reward_models_and_polishing(tmp_path):
    (tmp_path / "own.jsonl").write_text("{}")
    nodes = Graph(compose(["recipe.reward_seeds=[0]", f"preferences.sources=[{tmp_path}/own.jsonl]"])).nodes
    assert {name for name, node in nodes.items() if "own" in node.inputs} == {"reward-judge-0", "reward", "preference"}
    assert "preferences" not in Graph(compose([])).nodes
