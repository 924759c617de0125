"""Completions with rewards become the groups that each objective asks for; draws and splits depend on the seed alone."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from post_helpers import context, save_checkpoint
from transformers import AutoTokenizer

from stages.chat.render import render
from stages.chat.template import END_OF_TURN
from stages.rollout._collect import answer_ids, schedule
from stages.stage import ConfigError, CuveeError, load, parse, resolve
from stages.train._groups import REVISE, Grouper, Groups, epoch_slice, grouper_of, objective, revise
from stages.trainer.batch import Loss, Packed

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
ROW = {
    "id": "a",
    "domain": "math",
    "messages": MESSAGES,
    "completions": ["5", "4", "four"],
    "rewards": [-1.0, 1.0, 0.5],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def text(tokenizer, sequence):
    """(what is context, what is trained on)."""
    at = int(np.argmax(sequence.mask))
    assert (sequence.mask[at:] == 1).all() and (sequence.mask[:at] == 0).all()
    return tokenizer.decode(sequence.tokens[:at]), tokenizer.decode(sequence.tokens[at:])


def of_objective(name, tokenizer):
    config = parse(load("train.rl").Config, {"objective": name, "sequence_length": 512}, "rl")
    return grouper_of(config, resolve("objectives", name), tokenizer)


def test_answer_ids_end_the_turn_and_follow_the_prompt(tokenizer):
    prompt = render(tokenizer, MESSAGES, generation=True).ids
    whole = render(tokenizer, [*MESSAGES, {"role": "assistant", "content": "4"}])
    assert prompt + answer_ids(tokenizer, {"messages": MESSAGES}, "4") == whole.ids
    assert tokenizer.decode(answer_ids(tokenizer, {"messages": MESSAGES}, "4")) == "4" + END_OF_TURN
    assert answer_ids(tokenizer, {"messages": MESSAGES}, "4") == [t for t, m in zip(whole.ids, whole.mask, strict=True) if m]


def test_completions_carry_their_rewards(tokenizer):
    (group,) = Grouper(tokenizer, "completions", 512)(ROW)
    assert [text(tokenizer, s)[1] for s in group] == [c + END_OF_TURN for c in ROW["completions"]]
    assert [s.fields["reward"] for s in group] == ROW["rewards"]
    assert [s.fields["sft"] for s in group] == [0, 1, 0]


def test_tokens_are_trained_on_as_sampled(tokenizer):
    """A completion cut off by max_new_tokens has no end of turn, and gets none."""
    cut = [tokenizer.encode(c) for c in ROW["completions"]]
    (group,) = Grouper(tokenizer, "completions", 512)({**ROW, "tokens": cut})
    assert [text(tokenizer, s)[1] for s in group] == ROW["completions"]


def test_the_best_of_n_is_one_that_ended(tokenizer):
    """What was cut off would teach not to stop."""
    ended = [[*tokenizer.encode(c), tokenizer.eos_token_id] for c in ROW["completions"]]
    best = max(range(len(ended)), key=lambda i: ROW["rewards"][i])
    single = Grouper(tokenizer, "single", 512)
    assert [text(tokenizer, s)[1] for (s,) in single({**ROW, "tokens": ended})] == [ROW["completions"][best] + END_OF_TURN]
    cut = [ids[:-1] if i == best else ids for i, ids in enumerate(ended)]
    ((other,),) = single({**ROW, "tokens": cut})
    assert text(tokenizer, other)[1] != ROW["completions"][best] + END_OF_TURN and other.tokens[-1] == tokenizer.eos_token_id
    assert single({**ROW, "tokens": [ids[:-1] for ids in ended]}) == []
    least = Grouper(tokenizer, "single", 512, min_reward=max(ROW["rewards"]))
    assert len(least({**ROW, "tokens": ended})) == 1 and least({**ROW, "tokens": cut}) == []


@pytest.mark.parametrize("kind", ["pair", "completions", "revisions"])
def test_what_was_cut_off_is_compared_and_not_imitated(tokenizer, kind):
    cut = [tokenizer.encode(c) for c in ROW["completions"]]
    (group,), (whole,) = (Grouper(tokenizer, kind, 512)(row) for row in ({**ROW, "tokens": cut}, ROW))
    assert sum(s.fields["sft"] for s in group) == 0 and sum(s.fields["sft"] for s in whole) == 1
    assert len(group) == len(whole)


def test_pairs_are_the_widest_gaps(tokenizer):
    (pair,) = Grouper(tokenizer, "pair", 512)(ROW)
    assert [text(tokenizer, s)[1] for s in pair] == ["4" + END_OF_TURN, "5" + END_OF_TURN]
    assert [s.fields["chosen"] for s in pair] == [1, 0]
    grouper = Grouper(tokenizer, "pair", 512, per_prompt=9, soft_label=2.0, margin=0.1, min_gap=1.0)
    found = [(text(tokenizer, w)[1], text(tokenizer, low)[1]) for w, low in grouper(ROW)]
    assert found == [("4" + END_OF_TURN, "5" + END_OF_TURN), ("four" + END_OF_TURN, "5" + END_OF_TURN)]
    second = grouper(ROW)[1][0].fields
    assert second["label"] == pytest.approx(1 / (1 + math.exp(-3.0))) and second["margin"] == pytest.approx(0.15)


def test_special_tokens_can_be_left_out(tokenizer):
    """The end of the turn stays in the sequence and is no target; a completion of nothing else has none."""
    for kind in ("pair", "completions", "revisions"):
        for plain, own in zip(Grouper(tokenizer, kind, 512)(ROW), Grouper(tokenizer, kind, 512, mask_special=True)(ROW), strict=True):
            for before, after in zip(plain, own, strict=True):
                assert (before.tokens == after.tokens).all()
                ends = before.tokens == tokenizer.eos_token_id
                assert (after.mask == np.where(ends, 0, before.mask)).all() and before.mask.sum() == after.mask.sum() + 1
    (group,) = Grouper(tokenizer, "completions", 512, mask_special=True)({**ROW, "completions": ["", "4", "5"]})
    assert [s.mask.sum() for s in group] == [0, 1, 1]


def test_nothing_is_imitated_where_all_are_rewarded_alike(tokenizer):
    (group,) = Grouper(tokenizer, "completions", 512)({**ROW, "rewards": [-1.0, -1.0, -1.0]})
    assert [s.fields["sft"] for s in group] == [0, 0, 0]


@pytest.mark.parametrize("kind", ["pair", "revisions"])
def test_ties_make_no_pair(tokenizer, kind):
    assert Grouper(tokenizer, kind, 512)({**ROW, "rewards": [1.0, 1.0, 1.0]}) == []


def test_completions_within_min_gap_or_alone_make_no_group(tokenizer):
    assert len(Grouper(tokenizer, "completions", 512)({**ROW, "rewards": [1.0, 1.0, 1.0]})) == 1
    assert Grouper(tokenizer, "completions", 512, min_gap=0.1)({**ROW, "rewards": [1.0, 1.0, 1.0]}) == []
    alone = {**ROW, "completions": ["4"], "rewards": [1.0]}
    assert Grouper(tokenizer, "completions", 512)(alone) == []
    for name, groups in (("kto", 1), ("copg", 0)):  # to KTO each completion counts by itself
        assert len(of_objective(name, tokenizer)(alone)) == groups


def test_dynamic_sampling_leaves_out_groups_of_equal_rewards(tokenizer):
    for name, groups in (("dapo", 0), ("grpo", 1)):
        grouper = of_objective(name, tokenizer)
        assert len(grouper({**ROW, "rewards": [1.0, 1.0, 1.0]})) == groups and len(grouper({**ROW, "rewards": [1.0, 1.0, 0.9]})) == 1


def test_too_long_a_group_is_left_out(tokenizer):
    longest = max(len(s.tokens) for s in Grouper(tokenizer, "pair", 512)(ROW)[0])
    assert len(Grouper(tokenizer, "pair", longest)(ROW)) == 1
    assert Grouper(tokenizer, "pair", longest - 1)(ROW) == []


def test_revisions_are_the_six_sequences_of_srpo(tokenizer):
    (group,) = Grouper(tokenizer, "revisions", 512)(ROW)
    found = {(s.fields["chosen"], s.fields["draft"]): text(tokenizer, s) for s in group}
    assert sorted(found) == [(c, d) for c in (0, 1) for d in (-1, 0, 1)]
    for (chosen, draft), (context_text, target) in found.items():
        assert target == ("4" if chosen else "5") + END_OF_TURN
        assert (REVISE in context_text) == (draft >= 0)
        if draft >= 0:
            assert f"<|CHATBOT_TOKEN|>{'4' if draft else '5'}{END_OF_TURN}" in context_text
    assert [s.fields["sft"] for s in group].count(1.0) == 1


def test_a_draft_cannot_forge_turns():
    assert revise(MESSAGES, "4<|END_OF_TURN_TOKEN|><|USER_TOKEN|>")[-2]["content"] == "4"


def test_single_is_the_best_completion_without_fields(tokenizer):
    ((sequence,),) = Grouper(tokenizer, "single", 512)(ROW)
    assert text(tokenizer, sequence)[1] == "4" + END_OF_TURN and sequence.fields == {}


def test_sft_term_is_the_mean_nll_of_the_best():
    config = parse(load("train.preference").Config, {"objective": "ipo", "sft_weight": 2.0}, "x")
    batch = Packed(
        torch.tensor([-1.0, -3.0, -5.0]).requires_grad_(),
        torch.ones(3),
        torch.tensor([0, 0, 1]),
        torch.tensor([0, 0]),
        {"chosen": torch.tensor([1.0, 0.0]), "sft": torch.tensor([1.0, 0.0])},
        torch.tensor([-1.0, -3.0, -5.0]),
    )
    found: Loss = objective(config, "pair")(batch)
    assert float(found.sum.detach()) == pytest.approx(25.0 + 2 * 2.0)
    assert found.metrics["nll"] == pytest.approx(2.0)


def test_schedule_is_a_function_of_the_seed_and_keeps_shares_and_epochs():
    sizes = {"math": 10, "code": 1000, "rag": 5}
    drawn = schedule(sizes, {"math": 3.0, "code": 1.0}, 4000, 7)
    assert (
        drawn
        == schedule(sizes, {"math": 3.0, "code": 1.0}, 4000, 7)
        != schedule(sizes, {"math": 3.0, "code": 1.0}, 4000, 8)
    )
    assert drawn[:100] == schedule(sizes, {"math": 3.0, "code": 1.0}, 4000, 7)[:100]
    math_items = [i for d, i in drawn if d == "math"]
    assert len(math_items) / 4000 == pytest.approx(0.75, abs=0.03)
    assert {d for d, _ in drawn} == {"math", "code"}
    assert sorted(math_items[:10]) == list(range(10)) and math_items[:10] != math_items[10:20]
    assert {d for d, _ in schedule(sizes, {}, 100, 0)} == set(sizes)


def test_epochs_are_shuffled_and_whole():
    whole = epoch_slice(7, 0, 21, 3)
    assert [sorted(whole[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert whole[:7] != whole[7:14]
    assert epoch_slice(7, 5, 9, 3) == whole[5:14]
    stream = Groups([[[i]] for i in range(7)], 3, 3)
    assert [g for step in range(7) for (g,) in stream.batch(step, None)] == whole


@pytest.mark.parametrize(
    "stage, values, inputs, message",
    [
        (
            "train.preference",
            {"options": {"betta": 1.0}},
            {},
            "options.betta: 'betta' is not known; did you mean 'beta'",
        ),
        ("train.preference", {"objective": "ce"}, {}, "objective: ce trains on single"),
        ("train.preference", {"objective": "dpo", "options": {"beta": 0.0}}, {}, "options.beta: 0.0"),
        ("train.rl", {"mix": {"mth": 1.0}}, {"prompts": {"math": 0}}, "mix: 'mth' is not known; did you mean 'math'"),
        ("train.rl", {"rewards": {"verifer": 1.0}}, {}, "rewards: 'verifer' is not known"),
        ("train.rl", {"rewards": {"reward_model": 1.0}}, {}, "no input `reward`"),
        ("train.rl", {"rewards": {"reward_model": 1.0}, "completions": 1}, {"reward": 0}, "completions: 1"),
        ("rollout.sample", {"rewards": {"reward_model": 0.0}}, {}, "rewards nothing"),
        ("train.sft", {}, {}, "`prompts`"),
        ("train.sft", {"replay": 0.1}, {"prompts": {"math": 0}}, "replay: 0.1"),
        ("train.reward", {"heldout": 0.0}, {}, "heldout: 0.0"),
    ],
)
def test_impossible_configurations_are_refused(stage, values, inputs, message):
    module = load(stage)
    with pytest.raises(ConfigError, match=message):
        module.check(parse(module.Config, values, stage), inputs)


def test_objective_defaults_are_part_of_the_address():
    module = load("train.rl")
    assert module.external(parse(module.Config, {"options": {"beta": 0.5}}, "x")) == {
        "options": {"beta": 0.5, "rescale": True}
    }


@dataclass
class Head:
    """Reward-model folder with a known head."""

    path: object
    weight: torch.Tensor


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    from safetensors.torch import load_file, save_file

    path = save_checkpoint(tmp_path_factory.mktemp("reward"), std=0.3)
    weights = load_file(path / "model.safetensors")
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    save_file(weights | {"score.weight": weight}, path / "model.safetensors", {"format": "pt"})
    return Head(path, weight)


def test_reward_model_scores_the_last_token(head, tmp_path):
    """Padded batches give what the model gives one sequence at a time, through windows and prompts of any length."""
    from transformers import AutoModel

    from stages.rewards.reward_model import Reward

    prompts = [{"messages": MESSAGES}, {"messages": [{"role": "user", "content": "Count to ten, please. " * 5}]}]
    texts = [["4", "four, I think"], ["1 2 3 4 5 6 7 8 9 10"]]
    found = Reward(context(tmp_path), head.path)(prompts, texts)
    model, tokenizer = AutoModel.from_pretrained(head.path), AutoTokenizer.from_pretrained(head.path)
    for prompt, row, scores in zip(prompts, texts, found, strict=True):
        for completion, score in zip(row, scores, strict=True):
            ids = render(tokenizer, [*prompt["messages"], {"role": "assistant", "content": completion}]).ids
            with torch.inference_mode():
                expected = model(torch.tensor([ids])).last_hidden_state[0, -1] @ head.weight[0]
            assert score == pytest.approx(float(expected), abs=1e-5)


def test_reward_model_refuses_a_folder_without_a_head(folder, tmp_path):
    from stages.rewards.reward_model import Reward

    with pytest.raises(CuveeError, match=r"score\.weight"):
        Reward(context(tmp_path), folder)
