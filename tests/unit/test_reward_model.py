"""Reward models: labels, ensembles, quality on held-out pairs, over-optimisation, Elo; then two stages on a tiny model."""

import json
import math
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from post_helpers import artifact, context, save_checkpoint
from tiny import jsonl

from stages.rewards.reward_model import Reward, Scorer
from stages.rollout._collect import answer_ids
from stages.stage import ConfigError, Kind, load, parse
from stages.train._groups import Grouper
from stages.train._judge import elo, optimised, quality
from stages.train.reward import Pairs, cut, relabelled, split, strength

STRENGTHS = [[1.0, 0.999], [0.5, 0.8]]


def test_a_label_is_that_of_the_strength_of_the_preference():
    assert [strength(STRENGTHS, gap) for gap in (2.0, 1.0, 0.7, 0.2)] == [0.999, 0.999, 0.8, 0.5]


def test_steps_end_with_the_epochs_over_the_prompts():
    epochs = [cut(config(steps=100, batch_groups=4, max_epochs=n), 50) for n in (1, 2, 9)]
    assert [one.steps for one in epochs] == [12, 25, 100]
    assert cut(config(steps=100, batch_groups=4, warmup_steps=40), 50).warmup_steps == 11


def test_every_reward_model_holds_out_the_same_prompts():
    rows = [{"id": str(i), "domain": "math"} for i in range(200)]
    kept, held_out = split([*rows, *rows], 0.2)
    ids = {row["id"] for row in held_out}
    assert not ids & {row["id"] for row in kept} and 20 < len(ids) < 60
    assert {row["id"] for row in split(rows[50:150], 0.2)[1]} == ids & {str(i) for i in range(50, 150)}
    assert len(split(rows[:1], 1e-9)[1]) == 1


def test_quality_of_known_margins():
    """Four pairs with confidence 0.75, one of them wrong, and a sure one: calibrated but for the last."""
    at = math.log(3)  # sigmoid(log 3) = 0.75
    found = quality(["a", "a", "a", "b", "b"], [at, at, at, -at, 20.0])
    assert (
        found["accuracy"] == 0.8 and found["domains"] == {"a": 1.0, "b": 0.5} and sum(found["margins"]["counts"]) == 5
    )
    assert [(one["n"], one["accuracy"]) for one in found["reliability"]] == [(4, 0.75), (1, 1.0)]
    assert found["ece"] == pytest.approx(0.0, abs=1e-6)
    wrong = quality(["a"] * 2, [4.0, -4.0])  # sure, and as often wrong as right
    assert wrong["ece"] == pytest.approx(1 / (1 + math.exp(-4.0)) - 0.5)


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(3, 8)).tolist(), rng.normal(size=(3, 8)).tolist()
    found = optimised(proxy, gold)
    assert [one["n"] for one in found] == [1, 2, 4, 8]
    for one in found:
        best = [max(some, key=lambda i: p[i]) for p in proxy for some in combinations(range(8), one["n"])]
        each = len(best) // 3
        assert one["gold"] == pytest.approx(np.mean([gold[k // each][i] for k, i in enumerate(best)]))
    assert [one["kl"] for one in found] == pytest.approx([math.log(n) - (n - 1) / n for n in (1, 2, 4, 8)])
    assert found[0]["proxy"] == pytest.approx(0.0, abs=1e-9) and found[-1]["proxy"] > found[1]["proxy"]


def test_an_over_optimised_proxy_shows():
    """The proxy follows the gold reward but for one completion that cheats it."""
    proxy, gold = [[0.0, 1.0, 2.0, 9.0]] * 5, [[0.0, 0.5, 1.0, 0.0]] * 5
    found = optimised(proxy, gold)
    assert found[1]["gold"] > found[0]["gold"] and found[2]["gold"] == 0.0 and found[2]["proxy"] > found[1]["proxy"]


def test_elo_is_the_bradley_terry_likelihoods_maximum():
    """There the gradient is 0: everyone wins as often as the model expects, the invented tie of each two included."""
    raters = np.array([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [1.0, 2.0, 2.0]])
    theta = np.array(elo(raters.tolist())) * math.log(10) / 400
    for i in range(3):
        others = [j for j in range(3) if j != i]
        won = sum((row[i] > row[j]) + 0.5 * (row[i] == row[j]) for row in raters for j in others) + 0.5 * len(others)
        expected = sum((len(raters) + 1) / (1 + math.exp(theta[j] - theta[i])) for j in others)
        assert expected == pytest.approx(won, abs=1e-6)
    assert theta.sum() == pytest.approx(0.0, abs=1e-9)
    assert max(elo([[1.0, 0.0]] * 50)) < 1000  # always the winner, yet finite


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return artifact(save_checkpoint(tmp_path_factory.mktemp("start"), std=0.1), Kind.CHECKPOINT)


def rows(count: int, seed: int) -> list[dict]:
    """Completions of one digit: even ones are better, 0 by half; two odd ones are alike."""
    rng = random.Random(seed)
    return [
        {"id": f"n{seed}-{i}", "domain": "math", "messages": [{"role": "user", "content": f"Pick {rng.randrange(1000)}"}],
         "completions": [*rng.sample("13579", 2), rng.choice("2468"), "0"], "rewards": [-1.0, -1.0, 1.0, 0.0]}
        for i in range(count)
    ]  # fmt: skip


def samples(folder: Path, count: int, seed: int):
    jsonl(folder / "samples.jsonl", rows(count, seed))
    return artifact(folder, Kind.PAIRS)


def config(**values):
    return parse(load("train.reward").Config, {"sequence_length": 128} | values, "reward")


def test_pairs_are_labelled_and_tied(start):
    make = Pairs(config(strengths=STRENGTHS, ties=2, pairs_per_prompt=9, margin=0.1), start.path)
    found = make(rows(1, 0)[0])
    gaps = [group[0].fields["reward"] - group[1].fields["reward"] for group in found]
    assert gaps == [2.0, 2.0, 1.0, 1.0, 1.0, 0.0]
    assert [round(group[0].fields["label"], 3) for group in found] == [0.999] * 5 + [0.5]
    assert [group[0].fields["margin"] for group in found] == pytest.approx([0.2, 0.2, 0.1, 0.1, 0.1, 0.0])
    assert found[-1][0].tokens.tolist() != found[-1][1].tokens.tolist()


def test_an_ensemble_labels_or_sorts_out(start):
    make = Pairs(config(pairs_per_prompt=3), start.path)
    prompts = [make(rows(1, 0)[0])]
    (labelled,) = relabelled(prompts, [[0.9, 0.2, 0.6]], config())
    assert [group[0].fields["label"] for group in labelled] == [0.9, 0.2, 0.6]
    (agreed,) = relabelled(prompts, [[0.9, 0.2, 0.6]], config(strengths=STRENGTHS, agree=True))
    assert agreed == [labelled[0], labelled[2]]
    assert relabelled(prompts, [[0.1, 0.2, 0.3]], config(strengths=STRENGTHS, agree=True)) == []


@pytest.mark.parametrize("values, inputs, message", [
    ({}, {"init": 0, "start": 0}, "`init` .* and `start`"),
    ({}, {}, "`init` .* and `start`"),
    ({"strengths": [[1.0, 2.0]]}, {"init": 0}, r"strengths: \[1.0, 2.0\]"),
    ({"strengths": [["much", 0.9]]}, {"init": 0}, r"strengths: \['much', 0.9\]"),
    ({"strengths": STRENGTHS[::-1]}, {"init": 0}, "the gaps of .* do not fall"),
    ({"soft_label": -1.0}, {"init": 0}, "soft_label: -1.0 is negative"),
    ({"max_epochs": 0}, {"init": 0}, "max_epochs: 0 trains on nothing"),
    ({"agree": True}, {"init": 0}, "agree: compares rewards with an ensemble"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused(values, inputs, message):
    with pytest.raises(ConfigError, match=message):
        load("train.reward").check(config(**values), inputs)


def test_two_stages_with_an_ensemble_and_a_probe(start, tmp_path):
    """Members learn from few pairs; the first stage sees no rewards but their labels, the second the best pairs."""
    torch.set_num_threads(1)
    best, many, probe = (
        samples(tmp_path / n, c, s) for n, c, s in (("best", 40, 0), ("many", 60, 1), ("probe", 12, 2))
    )
    common = {"schedule": "constant", "weight_decay": 0.0, "beta2": 0.99, "log_every": 1000, "steps": 60,
              "batch_groups": 4, "lr": 0.01, "pairs_per_prompt": 3, "heldout": 0.2}  # fmt: skip

    def train(name, values, **inputs):
        stage, folder = load("train.reward"), tmp_path / name
        folder.mkdir()
        found = config(**common | values)
        stage.check(found, inputs)
        metrics = stage.run(found, inputs, folder, context(tmp_path / f"{name}-scratch"))
        return artifact(folder, Kind.REWARD_MODEL), metrics

    ensemble = {str(s): train(f"judge-{s}", {"seed": s}, init=start, pairs=best)[0] for s in (0, 1)}
    blind = [row | {"rewards": row["rewards"][::-1]} for row in rows(60, 1)]  # wrong rewards: only labels can teach
    jsonl(many.path / "samples.jsonl", blind)
    first, learned = train("first", {"pairs_per_prompt": 6}, init=start, pairs=many, ensemble=ensemble)
    assert learned["heldout_accuracy"] < 0.5  # judged by the wrong rewards
    second = {"strengths": STRENGTHS, "ties": 1, "agree": True, "lr": 0.003}
    final, metrics = train("second", second, start=first, pairs=best, ensemble=ensemble, probe=probe)
    judged = json.loads((final.path / "judged.json").read_text())
    assert metrics["heldout_accuracy"] == judged["accuracy"] > 0.85
    assert metrics["heldout_pairs"] == judged["pairs"] and 0 <= metrics["heldout_ece"] <= 0.5
    assert judged["optimised"][-1]["gold"] > judged["optimised"][0]["gold"] + 0.5
    assert metrics["best_of_4/gold"] == judged["optimised"][-1]["gold"]
    scores_what_it_was_trained_on(final.path, context(tmp_path / "scratch"))


def scores_what_it_was_trained_on(model: Path, ctx) -> None:
    """The sampled tokens, the end of turn only where it came."""
    row, reward = rows(1, 9)[0], Reward(ctx, model)
    ended = [answer_ids(reward.tokenizer, row, text) for text in row["completions"]]
    cut = [ids[:-1] for ids in ended]
    trained = [s.tokens.tolist() for (s, *_) in Grouper(reward.tokenizer, "completions", 128)(row | {"tokens": cut})[:1]]
    assert reward([row], [row["completions"]]) == reward([row], [row["completions"]], [ended])
    assert reward([row], [row["completions"]], [cut])[0][0] == pytest.approx(Scorer(model, ctx)(trained)[0], abs=1e-5)
    assert reward([row], [row["completions"]], [cut])[0] != pytest.approx(reward([row], [row["completions"]])[0], abs=1e-3)


def test_a_ranker_learns_margins_from_elo(start, tmp_path):
    """Three raters of four documents; what most prefer is ranked first on documents of other questions."""
    torch.set_num_threads(1)
    found = rows(60, 3)
    for row in found:
        noisy = [random.Random(f"{row['id']}{i}").gauss(0, 0.3) for i in range(4)]
        row["parts"] = {
            "a": row["rewards"],
            "b": [r + n for r, n in zip(row["rewards"], noisy, strict=True)],
            "c": [0.0] * 4,
            "unjudged": [None, 1.0, 0.0, None],
        }
        row["rewards"] = [0.0] * 4
    values = config(
        elo=True, margin=0.002, steps=60, batch_groups=4, lr=0.01, schedule="constant", heldout=0.2, pairs_per_prompt=3,
        log_every=1000,
    )  # fmt: skip
    jsonl(tmp_path / "samples.jsonl", found)
    (tmp_path / "ranker").mkdir()
    inputs = {"init": start, "pairs": artifact(tmp_path, Kind.PAIRS)}
    metrics = load("train.reward").run(values, inputs, tmp_path / "ranker", context(tmp_path / "scratch"))
    assert metrics["heldout_accuracy"] > 0.85
