"""The mixture of domains from small models: the fit against planted laws, its minimum against a grid, the stage on real models."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from stages.data import mixture
from stages.data.indexed import write
from stages.stage import ConfigError, Kind

from tiny import artifact, checkpoint, context  # isort: skip

T = np.array([[-2.0, 0.1, 0.3], [0.2, -1.2, 0.0], [0.5, 0.4, -0.6]])
FLOOR = np.array([1.8, 1.2, 2.1])


def planted(count: int, noise: float, seed: int = 0):
    shares = np.array([list(one.values()) for one in mixture.mixes(["a", "b", "c"], count, seed)])
    shares /= shares.sum(1, keepdims=True)
    losses = FLOOR + np.exp(shares @ T.T)
    return shares, losses + np.random.default_rng(1).normal(0, noise, losses.shape)


def test_mixes_are_spread_alike_and_leave_no_domain_out():
    found = np.array([list(one.values()) for one in mixture.mixes(["a", "b", "c"], 2000, 0)])
    assert np.allclose(found.mean(0), 1 / 3, atol=0.02) and np.allclose(found.sum(1), 1, atol=1e-3) and 0.066 < found.min() < 0.07 and found.max() > 0.85
    assert mixture.mixes(["a", "b"], 3, 0) == mixture.mixes(["a", "b"], 3, 0) != mixture.mixes(["a", "b"], 3, 1)


@pytest.mark.parametrize("noise, most", [(0.0, 0.01), (0.01, 0.02)])
def test_losses_of_mixes_not_seen_are_predicted(noise, most):
    shares, losses = planted(16, noise)
    fits = [mixture.fit(shares, losses[:, i]) for i in range(3)]
    fresh, expected = planted(50, 0.0, seed=7)
    assert np.abs(mixture.predict(fits, fresh) - expected).mean() < most
    left_out = np.stack([one["left_out"] for one in fits], 1)
    assert mixture.rank_correlation(losses.sum(1), left_out.sum(1)) > 0.9
    # leaving one out in one step is leaving it out indeed
    i, one = 3, fits[0]
    rest = np.delete(np.arange(16), i)
    gram = shares.T @ shares + 1e-4 * np.eye(3)
    without = np.linalg.solve(gram - np.outer(shares[i], shares[i]), shares[rest].T @ np.log(losses[rest, 0] - one["floor"]))
    assert one["left_out"][i] == pytest.approx(one["floor"] + np.exp(shares[i] @ without), rel=1e-6)


@pytest.mark.parametrize("weights", [(1, 1, 1), (4, 1, 0), (0, 0, 1)])
def test_the_minimum_is_that_of_a_grid(weights):
    weights = np.array(weights) / sum(weights)
    fits = [{"floor": FLOOR[i], "t": T[i]} for i in range(3)]
    best = mixture.minimum(fits, weights)
    steps = np.linspace(0, 1, 101)
    grid = 0.2 / 3 + 0.8 * np.array([(a, b, 1 - a - b) for a, b in itertools.product(steps, steps) if a + b <= 1 + 1e-9])
    least = (mixture.predict(fits, grid) @ weights).min()
    assert float((mixture.predict(fits, best[None]) @ weights)[0]) <= least + 1e-4 and best.sum() == pytest.approx(1)


def test_the_stage(tmp_path):
    """Five models on two domains: every loss is the model's own, and the numbers agree with one another."""
    rng, tokens = np.random.default_rng(0), tmp_path / "tokens"
    tokens.mkdir()
    for domain in ("code", "prose"):
        write(tokens / f"heldout-{domain}", [rng.integers(20, 276, 40) for _ in range(4)], 276)
    models = {}
    for i in range(5):
        blend = {"code": i / 4 or 1e-4, "prose": 1 - i / 4 or 1e-4}
        models[f"mix-{i}"] = artifact(checkpoint(tmp_path / f"mix-{i}", seed=i), Kind.CHECKPOINT, config={"blend": blend})
    out = tmp_path / "out"
    out.mkdir()
    config = mixture.Config(tokens=200, length=64)
    metrics = mixture.run(config, {"models": models, "tokens": artifact(tokens, Kind.TOKENS)}, out, context(tmp_path / "s"))
    found = json.loads((out / "mixture.json").read_text())
    assert found["domains"] == ["code", "prose"] and len(found["models"]) == 5 and sum(found["best"].values()) == pytest.approx(1, abs=1e-3)
    assert all(4 < row["loss"][domain] < 8 for row in found["models"] for domain in found["domains"])  # ln 276 = 5.6
    assert len({row["loss"]["code"] for row in found["models"]}) == 5
    assert metrics["best_seen"] == min(row["target"] for row in found["models"]) and metrics["share/code"] == found["best"]["code"]


def test_what_is_refused():
    def model(**blend):
        return SimpleNamespace(blend=blend)

    with pytest.raises(ConfigError, match="models.b: blend is empty"):
        mixture.check(mixture.Config(), {"models": {"a": model(x=1.0), "b": model()}})
    with pytest.raises(ConfigError, match="3 are too few for 2 domains; train at least 4"):
        mixture.check(mixture.Config(), {"models": {name: model(x=0.5, y=0.5) for name in "abc"}})
    with pytest.raises(ConfigError, match="target: 'z' is not known"):
        mixture.check(mixture.Config(target={"z": 1.0}), {"models": {name: model(x=0.5, y=0.5) for name in "abcd"}})


def test_the_recipe_composes():
    from flows.config import compose
    from flows.graph import Graph

    graph = Graph(compose(["recipe=mixture", "scale=micro", "mixing.models=6"]))
    assert list(graph.nodes) == ["corpus", "tokenizer", "tokens", *(f"mix-{i:02d}" for i in range(6)), "mixture"]
    blends = [node.config.blend for name, node in graph.nodes.items() if name.startswith("mix-")]
    assert len({tuple(blend.values()) for blend in blends}) == 6 and all(set(blend) == {"code", "names", "prose"} for blend in blends)
    assert len({node.fingerprint for node in graph.nodes.values()}) == 10
    large = Graph(compose(["recipe=mixture", "scale=h100x1", "pretrain.steps=500"])).nodes["mix-00"].config
    assert (large.model.hidden_size, large.model.vocab_size > 4096, large.steps) == (128, True, 500)  # small at any scale, unless told
