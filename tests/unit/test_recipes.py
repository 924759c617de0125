"""The recipes besides Command A's: what makes each what it is, whatever the scale; arbitrage among pools of samples."""

import json
from functools import cache

import pytest
import tiny

from flows.config import compose
from flows.graph import Graph
from stages.rollout import pool
from stages.stage import ConfigError, CuveeError, Kind


@cache
def graph(*overrides):
    return Graph(compose(list(overrides)))


def parents(nodes):
    return {name: sorted({p.name for p in node.parents}) for name, node in nodes.items()}


@pytest.mark.parametrize("recipe", ["qwen", "aya_expanse", "llama3"])
def test_parts_and_models_of_the_registry_are_in_the_graph(recipe):
    found = graph(f"recipe={recipe}", "scale=micro")
    assert set(found.conf.recipe.parts) | set(found.conf.recipe.registered) <= set(found.nodes)
    assert len({node.fingerprint for node in found.nodes.values()}) == len(found.nodes)


def test_qwen_is_qwen_at_any_scale():
    for scale in ("micro", "laptop"):
        nodes = graph("recipe=qwen", f"scale={scale}").nodes
        model = nodes["base"].config.model
        assert (model.family, model.sliding_window, model.tie_embeddings) == ("qwen2", 0, False)
        assert model.num_query_groups == model.num_attention_heads
        assert nodes["tokenizer"].config.template == "chatml"
        assert nodes["chat"].config.completions == 2 and nodes["chat"].config.reward_weights() == {"reward_model": 1}
    found = parents(nodes)
    assert "reward-pretrained" in found["reward"] and "reward" in found["chat"] and "code-base" in found["code-chat"]
    assert graph("recipe=qwen", "tokenizer.template=compact").nodes["tokenizer"].config.template == "compact"


def test_aya_expanse_merges_after_arbitrage_and_each_round():
    nodes = graph("recipe=aya_expanse", "scale=micro").nodes
    found = parents(nodes)
    assert found["arbitrage"] == ["answers-multilingual", "answers-rag", "answers-safety"]
    assert found["merged"] == ["instruct", "sft-multilingual", "sft-rag", "sft-safety"]
    assert found["preferred-1"] == ["preferred-0", "preferred-1-seed-0", "preferred-1-seed-1"]
    assert "preferred-0" in found["pairs-1"] and nodes["preferred-1-seed-0"].config.objective == "dpo"
    assert found["export"] == ["preferred-2"]


def test_llama_averages_the_checkpoints_of_each_step():
    nodes = graph("recipe=llama3", "scale=micro", "recipe.polish_rounds=2").nodes
    found = parents(nodes)
    assert found["dpo-1"] == ["dpo-1-seed-0", "dpo-1-seed-1", "sft-1"]
    assert (
        "dpo-1" in found["rejection-samples-2"] and "dpo-1" in found["reward-pairs-2"] and "base" in found["reward-2"]
    )
    dpo = nodes["dpo-2-seed-1"].config
    assert (dpo.objective, dpo.sft_weight, dpo.mask_special) == ("dpo", 0.2, True)
    assert (
        nodes["base"].inputs["init"].config.model.family == "llama"
    )


def samples(folder, rewards: dict[str, list[float]], part: str = "verifier"):
    rows = [
        {"id": key, "domain": "math", "messages": [], "answer": "", "completions": [f"{folder.name}{i}" for i in range(len(r))],
         "tokens": [[i] for i in range(len(r))], "logprobs": [None] * len(r), "rewards": r, "parts": {part: r}}
        for key, r in rewards.items()
    ]  # fmt: skip
    tiny.jsonl(folder / "samples.jsonl", rows)
    return tiny.artifact(folder, Kind.PAIRS)


def run(tmp_path, pools, **values):
    (tmp_path / "out").mkdir()
    metrics = pool.run(pool.Config(**values), {"pools": pools}, tmp_path / "out", tiny.context(tmp_path / "scratch"))
    return metrics, [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]


def test_a_pool_holds_all_completions_and_knows_who_wrote_them(tmp_path):
    pools = {"b": samples(tmp_path / "b", {"x": [0.1, 0.9], "y": [0.0, 0.0]}),
             "a": samples(tmp_path / "a", {"x": [0.5, 0.4], "y": [1.0, 0.0], "z": [1.0, 1.0]})}  # fmt: skip
    metrics, (x, y) = run(tmp_path, pools, best=3)
    assert (
        x["completions"] == ["b1", "a0", "a1"] and x["policies"] == ["b", "a", "a"] and x["rewards"] == [0.9, 0.5, 0.4]
    )
    assert (
        x["parts"] == {"verifier": [0.9, 0.5, 0.4]} and x["tokens"] == [[1], [0], [1]] and y["completions"][0] == "a0"
    )
    assert (metrics["prompts"], metrics["won/a"], metrics["won/b"], metrics["best"]) == (2, 0.5, 0.5, 0.95)


def test_a_prompt_that_was_drawn_twice_keeps_all_its_completions(tmp_path):
    one, again = (samples(tmp_path / name, {"x": rewards}) for name, rewards in (("a", [0.1]), ("c", [0.7, 0.2])))
    with open(one.path / "samples.jsonl", "a") as file:
        file.write((again.path / "samples.jsonl").read_text())
    _, (x,) = run(tmp_path, {"a": one, "b": samples(tmp_path / "b", {"x": [0.5]})})
    assert (x["completions"], x["policies"]) == (["c0", "b0", "c1", "a0"], ["a", "b", "a", "a"])
    assert x["parts"]["verifier"] == x["rewards"] == [0.7, 0.5, 0.2, 0.1]


def test_pools_that_cannot_be_compared_are_refused(tmp_path):
    one = samples(tmp_path / "a", {"x": [0.1]})
    with pytest.raises(CuveeError, match="no prompt in common"):
        run(tmp_path, {"a": one, "b": samples(tmp_path / "b", {"y": [0.1]})})
    (tmp_path / "out").rmdir()
    with pytest.raises(CuveeError, match="b is rewarded by length, a by verifier"):
        run(tmp_path, {"a": one, "b": samples(tmp_path / "b", {"x": [0.1]}, part="length")})
    with pytest.raises(ConfigError, match="best: -1"):
        pool.check(pool.Config(best=-1), {})
