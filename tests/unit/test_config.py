"""A wrong key, type or choice: one sentence with the nearest valid name. And the graph that a right one gives."""

import shutil
import threading
from functools import cache
from pathlib import Path

import pytest

from flows import config
from flows.config import compose
from flows.graph import Frontier, Graph, unaccompanied
from flows.plan import _bytes, _count, check_layout, known, predict, table, why
from stages.stage import ConfigError
from stages.store.local import LocalStore

EXPERTS = ("code", "safety", "rag", "math", "multilingual", "long_context")


@cache
def graph(*overrides):
    return Graph(compose(list(overrides)))


@pytest.mark.parametrize("override, sentence", [
    ("expert.mth.sft.lr=1", "expert.mth.sft.lr: 'mth' is not known; did you mean 'math'"),
    ("expert.math.sft.lrr=1", "expert.math.sft.lrr: 'lrr' is not known; did you mean 'lr'"),
    ("+expert.math.sft.lrr=1", "expert.math.sft.lrr: 'lrr' is not known; did you mean 'lr'"),
    ("expert.math.sft.lr=abc", "expert.math.sft.lr=abc: .*'abc'.*Float"),
    ("expert.math.rl.objective=cpg", "expert.math.rl.objective: 'cpg' is not known; did you mean 'copg'"),
    ("expert.math.rl.options.bta=1", "expert.math.rl.options.bta: 'bta' is not known; did you mean 'beta'"),
    ("data.sources=/a/folder", r"data.sources=/a/folder: it takes a list: data.sources=\[/a/folder\]"),
    ("instruct.lr=nan", "instruct.lr: nan is not a finite number"),
    ("instruct.lr=inf", "instruct.lr: inf is not a finite number"),
    ("soup.sft.weights.math=inf", "soup.sft.weights.math: inf is not a finite number"),
    ("scale=lptop", "scale: 'lptop' is not known; did you mean 'laptop'"),
    ("recipe.experts=[code,mth]", "recipe.experts: 'mth' is not known; did you mean 'math'"),
    ("recipe.experts=[]", "recipe.experts is empty"),
    ("expert.math=3", "expert.math=3: expert.math is a section"),
    ("polish.online=3", "polish.online=3"),
    ("expert.math.start=bas", "expert.math.start=bas: it must be instruct or base"),
    ("expert.math.seeds=[]", "expert.math.seeds is empty"),
    ("expert.math.seeds=[a]", r"expert.math.seeds=\['a'\]: it must be a list of whole numbers"),
    ("expert.math.anchor=2", "expert.math.anchor=2: it must be a share"),
    ("expert.math.redo=maybe", "expert.math.redo=maybe: it must be true or false"),
    ("expert.code.refine.lr=abc expert.code.refine_seeds=[0]", "expert.code.sft.lr: Value 'abc'"),
    ("cluster.devices=0", "cluster.devices=0: it must be a whole number from 1"),
    ("cluster.memory_gib=much", "cluster.memory_gib=much: it must be a number above 0"),
    ("cluster=kubernetes cluster.volume=3", "cluster.volume=3: it must be a section"),
    ("recipe.experts=code", "recipe.experts=code: it must be a list"),
    ("recipe.reward_policy=base", "recipe.reward_policy=base: it must be instruct or sft-soup"),
    ("recipe.polish_rounds=-1", "recipe.polish_rounds=-1: it must be a whole number from 0"),
    ("recipe=mixture mixing.max_epochs=x", "pretrain.max_epochs: Value 'x'"),
    ("recipe=mixture pretrain.sequence_length=0", "^pretrain.sequence_length: 0"),
    ("evaluate.prompts_per_domain=0", "polish.choose.skip: 0 chooses by the prompts that evaluation reports"),
    ("scale.expert_sft.lr=abc", "^expert.code.sft.lr: "),
    ("recipe.also=[cod]", "recipe.also: 'cod' is not known; did you mean 'code'"),
    ("data.sources=3", "data.sources=3"),
    ("data.sources=[]", "data.sources"),
    ("instruct=3", "instruct is a section"),
    ("instruct.steps=0", "instruct.steps: 0"),
    ("store=s3", "store.uri must be given"),
    ("nothing", "has no value; write it as key=value"),
    ("cluster=kubernetes cluster.restart=3", "cluster.restart: 'restart' is not known; did you mean 'restarts'"),
])
def test_a_wrong_override_is_one_sentence(override, sentence):
    with pytest.raises(ConfigError, match=sentence) as raised:
        graph(*override.split())
    assert "\n" not in str(raised.value)


def test_a_dictionary_takes_keys_of_ones_own():
    conf = compose(["cluster=kubernetes", 'cluster.resources={rdma/hca: "8"}', "cluster.env.NCCL_DEBUG=INFO",
                    "cluster.pod={nodeSelector: {pool: h100}}", "expert.math.refine.mix={rag: 1}"])  # fmt: skip
    assert dict(conf.cluster.resources) == {"rdma/hca": "8"} and conf.cluster.env.NCCL_DEBUG == "INFO"
    assert conf.cluster.pod.nodeSelector.pool == "h100" and conf.expert.math.refine.mix == {"rag": 1}


def test_the_recipe_is_expert_fan_out_merge_rl_fan_out_merge_polish():
    nodes = graph().nodes
    parents = {name: sorted(p.name for p in node.parents) for name, node in nodes.items()}
    assert parents["sft-soup"] == sorted([*(f"sft-{e}" for e in EXPERTS), "instruct"])
    assert parents["rl-soup"] == sorted([*(f"rl-{e}" for e in EXPERTS), "sft-soup"])
    assert all("sft-soup" in parents[f"rl-{e}"] for e in EXPERTS if e != "code")
    assert all("instruct" in parents[f"sft-{e}"] for e in EXPERTS)
    assert "rl-soup" in parents["best-of-n"] and "best-of-n" in parents["preference"] and "preference" in parents["online"]
    assert {"rl-soup", "best-of-n", "preference", "online"} < set(parents["polished"]) and parents["export"] == ["polished"]
    assert {"reward-first", "reward-pairs", "reward-judge-0", "reward-probe"} < set(parents["reward"])
    assert len([n for n in nodes if n.startswith("scores-")]) == 3 + 6 + 1 + 6 + 1 + 4


@pytest.mark.parametrize("policy", ["instruct", "sft-soup"])
def test_the_reward_model_is_made_from_the_model_whose_answers_it_judges(policy):
    nodes = graph(f"recipe.reward_policy={policy}").nodes
    models = {"instruct", "sft-soup"}
    for name in ("reward-pairs", "reward-pairs-many", "reward-probe", "reward-judge-0", "reward-first"):
        assert {p.name for p in nodes[name].parents} & models == {policy}, name


def test_experts_differ_by_their_options():
    """Section 3.3.3's code expert in full: seeds merged twice, trained again without itself, RL merged with its start."""
    full = ["expert.code.seeds=[0,1]", "expert.code.refine_seeds=[0,1]", "expert.code.redo=true",
            "expert.long_context.start=base", "soup.sft.weights.code=2"]  # fmt: skip
    nodes = graph(*full).nodes
    parents = {name: sorted(p.name for p in node.parents) for name, node in nodes.items()}
    assert parents["sft-code-first"] == ["instruct", "sft-code-first-seed-0", "sft-code-first-seed-1"]
    assert [nodes[f"sft-code-seed-{s}"].config.seed for s in (0, 1)] == [0, 1]
    assert nodes["sft-code-seed-0"].config.mix == nodes["sft-code-again-seed-0"].config.mix == {"code": 1.0}
    assert set(nodes["sft-code-first-seed-0"].config.mix) == {"code", "math"}
    assert parents["sft-code"] == ["sft-code-first", "sft-code-seed-0", "sft-code-seed-1"]
    others = sorted(f"sft-{e}" for e in EXPERTS if e != "code")
    assert parents["sft-soup-without-code"] == sorted(["instruct", *others])
    assert "sft-soup-without-code" in parents["sft-code-again-seed-0"]
    assert nodes["sft-soup"].config.weights["code"] == 2 and "code" not in nodes["sft-soup-without-code"].config.weights
    assert "sft-code-again" in parents["rl-code-alone"] and set(parents["rl-code"]) == {"rl-code-alone", "sft-code-again"}
    assert "base" in parents["sft-long_context"] and "instruct" not in parents["sft-long_context"]
    assert changed("expert.code.anchor=0.5") == downstream("rl-code")


def test_rounds_of_polishing_follow_each_other():
    nodes = graph("recipe.polish_rounds=3").nodes
    parents = {name: sorted(p.name for p in node.parents) for name, node in nodes.items()}
    seeds = [n.config.seed for name, n in nodes.items() if name.startswith(("best-of-n-samples", "preference-pairs"))]
    assert len(seeds) == len(set(seeds)) == 6, "no draw is another's again"
    assert "polished-1" in parents["best-of-n-2"] and "polished-2" in parents["best-of-n-samples-3"]
    assert "online-3" in parents["polished"] and parents["export"] == ["polished"]
    without = graph("recipe.polish_rounds=0").nodes
    assert [p.name for p in without["export"].parents] == ["rl-soup"] and "polished" not in without
    seeds = [nodes[f"best-of-n-samples{at}"].config.seed for at in ("", "-2", "-3")]
    assert len(set(seeds)) == 3  # every round draws its own


def changed(*overrides):
    before, after = graph().nodes, graph(*overrides).nodes
    return {name for name, node in after.items() if node.fingerprint != before[name].fingerprint}


def downstream(name):
    nodes = graph().nodes
    found = {name}
    for other, node in nodes.items():
        if any(p.name in found for p in node.parents):
            found.add(other)
    return found


def test_changing_one_experts_learning_rate_remakes_it_and_what_depends_on_it():
    assert changed("expert.math.sft.lr=0.123") == downstream("sft-math")
    assert "sft-code" not in downstream("sft-math") and "polished" in downstream("sft-math")
    assert changed("expert.code.rl.lr=0.123") == downstream("rl-code-alone")


@pytest.mark.parametrize("override", ["instruct.micro_batch_tokens=7777", "cluster.cores=1", "pretrain.save_every=3"])
def test_placement_changes_no_address(override):
    assert changed(override) == set()


def test_fewer_experts_and_a_part_of_the_graph():
    small = graph("recipe.experts=[code,math]")
    assert {n for n in small.nodes if n.startswith("rl-")} == {"rl-code-alone", "rl-code", "rl-math", "rl-soup"}
    assert set(graph("recipe.experts=[rag]").nodes["sft-rag"].config.mix) == {"rag"}  # its share of long_context is gone
    part = [n.name for n in small.until(["sft-soup"])]
    assert part[-1] == "sft-soup" and "rl-code" not in part and "corpus" in part
    with pytest.raises(ConfigError, match="did you mean 'polished'"):
        small.until(["polishd"])


def test_a_stage_beside_which_others_may_run_leaves_them_cores():
    nodes = list(graph().nodes.values())
    assert unaccompanied(nodes) == {"corpus", "tokenizer", "tokens", "pretrained", "base", "instruct", "sft-soup", "report"}
    assert "online" in unaccompanied(graph().until(["polished"])) and "rl-math" not in unaccompanied(graph().until(["polished"]))


def test_a_stage_is_next_once_all_that_it_needs_is_made():
    frontier = Frontier(list(graph("recipe.experts=[code,math]").nodes.values()))
    assert frontier.after("corpus") == ["prompts-code", "prompts-math"]
    assert frontier.after("prompts-code") == [] and frontier.after("prompts-math") == ["tokenizer"]
    assert frontier.after("tokenizer") == ["tokens"] and frontier.after("tokens") == ["pretrained"]


def test_instruction_following_feeds_instruct_and_polish_without_an_expert():
    nodes = graph("scale=h100x1").nodes
    named = "instruction_following"
    prompted = {name for name, node in nodes.items() if named in (node.inputs.get("prompts") or {})}
    assert {"instruct", "reward-pairs", "best-of-n-samples", "online", "scores-polished"} <= prompted
    assert not {f"sft-{named}", f"rl-{named}"} & set(nodes)
    assert "agent" in nodes["prompts-rag"].config.options["kinds"]  # the larger scales take conf/tasks/graded.yaml
    both = graph("scale=h100x1", f"recipe.experts=[code,{named}]").nodes  # an expert too, with the same prompts
    assert both[f"prompts-{named}"].fingerprint == nodes[f"prompts-{named}"].fingerprint and f"rl-{named}" in both


def test_plan_says_what_runs_and_refuses_what_cannot_fit(tmp_path):
    store, small = LocalStore(tmp_path), graph("recipe.experts=[code]")
    lines = list(table(store, small, list(small.nodes.values())))
    assert lines[-2].startswith(f"{len(small.nodes)} of {len(small.nodes)} stages will run")
    assert "not from a run: with full sequences" in lines[-1]
    assert lines[1].split()[0] == "corpus" and lines[1].endswith("  new")
    large = graph("model=command_a")
    with pytest.raises(ConfigError, match="pretrain: sequences of 256 take 1,7.* GiB of a device .* but cluster=local has 8; choose a smaller"):
        list(table(store, large, list(large.nodes.values())))


def test_plan_counts_what_teachers_are_asked(tmp_path):
    judge = "{own: {model: m, url: http://127.0.0.1:1/v1}}"
    asking = graph("recipe.experts=[code]", f"polish.online.judges={judge}", "polish.online.rewards={verifier: 1.0, own: 0.5}",
                   "polish.online.steps=10", "polish.online.batch_groups=8", "polish.online.completions=2")  # fmt: skip
    lines = list(table(LocalStore(tmp_path), asking, list(asking.nodes.values())))
    assert lines[-2].startswith("teachers are asked, in requests at most: online 160; ")
    assert not any(node.estimate.requests for node in graph().nodes.values())


def test_plan_takes_its_times_from_a_run_of_about_that_size():
    node = graph("recipe.experts=[code]").nodes["instruct"]
    work = vars(node.estimate)
    flops = 6.0 * work["parameters"] * work["train_tokens"]
    before = {"seconds": 60.0, "estimate": {**work, "train_tokens": work["train_tokens"] // 2}}
    assert predict(node, before, 1e12) == (pytest.approx(120.0), True)
    before["estimate"]["train_tokens"] = work["train_tokens"] // 20  # too small to say anything
    assert predict(node, before, 1e12) == predict(node, None, 1e12) == (pytest.approx(flops / 1e12), False)


@pytest.mark.parametrize("changed, told", [
    (["corpus"], "input corpus changed"),
    (["a", "b", "c", "d"], "input a, b, c, d changed"),
    (["a", "b", "c", "d", "e"], "input a, b, c and 2 others changed"),
])  # fmt: skip
def test_plan_names_the_inputs_that_changed(changed, told):
    node = graph("recipe.experts=[code]").nodes["instruct"]
    inputs = node.map_inputs(lambda n: {"fingerprint": n.fingerprint})
    before = {"stage": node.stage, "version": node.module.VERSION, "config": node.identity, "external": node.external}
    assert why(node, before | {"inputs": inputs | {name: {"fingerprint": "0"} for name in changed}}) == told


def test_plans_figures_have_no_exponents():
    assert (_bytes(1023 * 2**20), _bytes(1.5 * 2**30), _bytes(3)) == ("1020 MiB", "1.5 GiB", "-")
    assert (_count(999_999), _count(57_344), _count(42), _count(0)) == ("1000k", "57.3k", "42", "-")


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """A copy of conf/ to add files to."""
    monkeypatch.setattr(config, "CONF", shutil.copytree(config.CONF, tmp_path / "conf"))
    return config.CONF


@pytest.mark.parametrize("text, sentence", [
    ("instruct: {stpes: 3}", "conf/scale/own.yaml: instruct.stpes: Key 'stpes'"),
    ("instruct: {steps: abc}", "conf/scale/own.yaml: instruct.steps: Value 'abc'"),
    ("instruct: {steps: 3", "own.yaml, line 3: expected"),
    ("defaults: [override /model: 9b]", "Could not find 'model/9b'"),
])
def test_a_mistake_in_a_file_of_ones_own_is_one_sentence(conf, text, sentence):
    (conf / "scale/own.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(ConfigError, match=sentence) as raised:
        compose(["scale=own"])
    assert "\n" not in str(raised.value)


def test_a_new_expert_is_one_yaml(conf):
    """A file in conf/expert is an expert: no list to edit."""
    (conf / "expert" / "algebra.yaml").write_text("defaults: [_base, _self_]\nprompts: {domain: math}\n")
    assert "rl-algebra" in graph("recipe.experts=[code,algebra]").nodes


def test_the_best_seeds_are_averaged_by_prompts_that_no_score_is_reported_of():
    nodes = graph("expert.code.seeds=[0,1,2]", "recipe.seeds_kept=2").nodes
    names = [f"trial-sft-code-{s}" for s in (0, 1, 2)]
    assert set(names) < {p.name for p in nodes["sft-code"].parents} and nodes["sft-code"].config.top == 2
    judged, reported = nodes[names[0]], nodes["scores-sft-code"]
    assert judged.config.skip == reported.config.prompts_per_domain and list(judged.inputs["prompts"]) == ["code"]


def test_any_sft_can_replay_pretraining_documents():
    full = ["expert.code.refine_seeds=[0,1]", "expert.code.redo=true"]
    nodes = graph(*full, "expert.code.sft.replay=0.1").nodes
    replaying = {name for name, node in nodes.items() if node.stage == "train.sft" and node.inputs.get("tokens")}
    own = ("first", "seed-0", "seed-1", "again-seed-0", "again-seed-1")
    assert replaying == {f"sft-code-{name}" for name in own}
    assert changed("expert.math.sft.replay=0.1") == downstream("sft-math")


def test_plan_counts_a_value_network(tmp_path):
    values = ["scale=h100x8", "cluster=h100x8", "expert.math.rl.rollout_every=1", "expert.math.rl.sft_weight=0",
              "expert.math.rl.min_gap=0"]  # fmt: skip
    memory, tokens = [], []
    for objective in ("grpo", "ppo"):
        found = graph(*values, f"expert.math.rl.objective={objective}", "expert.math.rl.options={beta: 0.05}")
        node = found.nodes["rl-math"]
        memory.append(check_layout(node, found.conf.cluster))
        tokens.append(node.estimate.train_tokens)
    assert tokens[1] == 2 * tokens[0]
    weight = node.estimate.parameters / found.conf.cluster.devices
    assert memory[1] - memory[0] > 4 * weight


@pytest.mark.parametrize("words", [
    ["run", "--until", "sft-soup", "scale=micro", "+data=web"],
    ["run", "scale=micro", "--until=sft-soup", "+data=web"],
    ["run", "scale=micro", "+data=web", "--until", "sft-soup"],
])  # fmt: skip
def test_options_and_overrides_stand_in_any_order(words):
    from flows.cli import _parse

    args = _parse(words)
    assert args.until == "sft-soup" and args.overrides == ["scale=micro", "+data=web"]
    args = _parse(["chat", "polished", "--temperature", "0.5", "store=s3"])
    assert (args.artifact, args.temperature, args.overrides) == ("polished", 0.5, ["store=s3"])


class Bucket:
    """A store that answers no question before eight are asked."""

    def __init__(self):
        self.listed, self.barrier = 0, threading.Barrier(8)

    def aliases(self):
        self.listed += 1
        return {}

    def record(self, fingerprint):
        self.barrier.wait(20)


def test_a_plan_asks_a_bucket_all_at_once():
    nodes = list(graph("recipe.experts=[code]", "scale=micro").nodes.values())[:16]
    store = Bucket()
    assert known(store, nodes) == [(None, None)] * 16 and store.listed == 1


def test_the_home_folder_may_be_written_short():
    conf = compose(["data.sources=[~/docs,s3://b/x]", "store.uri=~/store"])
    assert list(conf.data.sources) == [f"{Path.home()}/docs", "s3://b/x"] and conf.store.uri == f"{Path.home()}/store"
