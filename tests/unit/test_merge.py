"""Merging: each method against worked examples, then whole checkpoints."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from stages.merge import soup
from stages.stage import ConfigError, CuveeError, Kind, names, parse, resolve

BASE = torch.tensor([1.0, 2.0, 3.0, 4.0])


def merge(method, deltas, weights=None, options=None, seed=0, base=None):
    module = resolve("merge/methods", method)
    base = BASE[: len(deltas[0])] if base is None else base
    tensors = [base + torch.tensor(delta) for delta in deltas]
    config = parse(module.Config, options or {}, "options")
    return module.merge(tensors, weights or [1.0] * len(tensors), base, config, seed) - base


def test_linear_is_the_weighted_mean():
    found = merge("linear", [[4.0, 0.0], [0.0, 8.0]], [3.0, 1.0])
    assert found.tolist() == [3.0, 2.0]


def test_task_arithmetic_is_not_normalised():
    found = merge("task_arithmetic", [[4.0, 0.0], [0.0, 8.0]], [1.0, 0.5], {"scale": 0.5})
    assert found.tolist() == [2.0, 2.0]


def test_ties_trims_elects_and_averages():
    found = merge("ties", [[4.0, -1.0, 0.5, 2.0], [-1.0, 3.0, 0.2, 2.0]], options={"density": 0.5})
    assert found.tolist() == [4.0, 3.0, 0.0, 2.0]


def test_ties_keeps_equal_entries():
    assert merge("ties", [[1.0, 1.0, 1.0, 0.0]], options={"density": 0.5}).tolist() == [1.0, 1.0, 1.0, 0.0]


def test_ties_weighs_only_who_agrees():
    found = merge("ties", [[4.0], [-1.0], [1.0]], [1.0, 1.0, 2.0], {"density": 1.0})
    assert found.tolist() == [2.0]  # (4 + 2 * 1) / 3


def test_model_stock_interpolates_by_agreement():
    found = merge("model_stock", [[1.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(found, torch.tensor([0.6, 0.3]))


def test_model_stock_stays_at_the_base_when_models_disagree():
    assert merge("model_stock", [[1.0, 0.0], [-1.0, 0.0]]).tolist() == [0.0, 0.0]


def test_slerp_keeps_the_length_between_vectors_of_one_length():
    a, b = [1.0, 0.0], [0.0, 1.0]
    found = merge("slerp", [a, b], [2.0, 1.0], base=torch.zeros(2))
    torch.testing.assert_close(found, torch.tensor([3**0.5 / 2, 0.5]))  # a third of the way: 30 degrees
    parallel = merge("slerp", [a, [3.0, 0.0]], base=torch.zeros(2))
    assert parallel.tolist() == [2.0, 0.0]


def test_dare_keeps_the_mean_and_is_a_function_of_the_seed():
    delta = [1.0] * 20_000
    base = torch.zeros(20_000)
    found = merge("dare", [delta], options={"density": 0.25}, seed=3, base=base)
    assert sorted(found.unique().tolist()) == [0.0, 4.0]
    assert found.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(found, merge("dare", [delta], options={"density": 0.25}, seed=3, base=base))
    assert not torch.equal(found, merge("dare", [delta], options={"density": 0.25}, seed=4, base=base))


def test_inner_products_of_large_tensors_are_taken_in_pieces(monkeypatch):
    from stages.merge import _math

    a, b = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    whole = _math.dot(a, b)
    monkeypatch.setattr(_math, "PIECE", 4)
    assert _math.dot(a, b) == pytest.approx(whole, rel=1e-12) and whole == pytest.approx(float((a * b).sum()), rel=1e-5)


@pytest.mark.parametrize("method", names("merge/methods"))
def test_every_method_returns_equal_models_unchanged(method):
    module = resolve("merge/methods", method)
    count = module.MODELS[0]
    delta = [0.5, -0.25, 1.0, 2.0]
    options = {"density": 1.0} if hasattr(module.Config, "density") else {}
    torch.testing.assert_close(merge(method, [delta] * count, options=options), torch.tensor(delta))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.checkpoint(root / name, seed) for seed, name in enumerate(["base", "code", "math", "rag"])}


def inputs(folders, *models, base=True):
    found = {"models": {name: tiny.artifact(folders[name], Kind.CHECKPOINT) for name in models}}
    return found | ({"base": tiny.artifact(folders["base"], Kind.CHECKPOINT)} if base else {})


def blend(folders, tmp_path, *models, out="out", **config):
    (tmp_path / out).mkdir()
    return soup.run(soup.Config(**config), inputs(folders, *models), tmp_path / out, tiny.context(tmp_path / "scratch"))


def test_soup_writes_a_checkpoint_like_its_parents(folders, tmp_path):
    (folders["code"] / "rollouts.jsonl").write_text("{}\n")  # what one expert was trained on is no part of a model
    metrics = blend(folders, tmp_path, "rag", "code", "math", weights={"code": 2.0})
    parents = [load_file(folders[name] / "model.safetensors") for name in ("code", "math", "rag")]
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == parents[0].keys()
    for key, tensor in found.items():
        expected = 0.5 * parents[0][key] + 0.25 * parents[1][key] + 0.25 * parents[2][key]
        torch.testing.assert_close(tensor, expected)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in folders["code"].iterdir()} - {"rollouts.jsonl"}
    assert metrics["models"] == 3 and metrics["parameters"] == sum(t.numel() for t in found.values())
    assert metrics["change/soup"] < metrics["change/code"]
    assert metrics["cosine/code/math"] == pytest.approx(0.5, abs=0.1)  # all start from another random base

    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == metrics["parameters"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 276


@pytest.mark.parametrize("method", ["linear", "ties", "dare", "model_stock"])
def test_bytes_depend_neither_on_the_order_nor_on_threads(folders, tmp_path, method):
    blend(folders, tmp_path, "code", "math", out="a", method=method)
    torch.set_num_threads(2)
    blend(folders, tmp_path, "math", "code", out="b", method=method)
    torch.set_num_threads(1)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_shards_and_a_tied_output_embedding_are_kept(folders, tmp_path):
    sharded = {}
    for name in ("base", "code", "math"):
        sharded[name] = shutil.copytree(folders[name], tmp_path / name)
        tensors = load_file(folders[name] / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        keys = sorted(tensors)
        index = {key: f"model-{1 + (i > 3)}.safetensors" for i, key in enumerate(keys)}
        for file in set(index.values()):
            save_file({k: tensors[k] for k in keys if index[k] == file}, tmp_path / name / file)
        (tmp_path / name / "model.safetensors").unlink()
        (tmp_path / name / "model.safetensors.index.json").write_text(f'{{"weight_map": {index}}}'.replace("'", '"'))
    blend(sharded, tmp_path, "code", "math", method="dare", options={"density": 0.5})
    one, two = (load_file(tmp_path / "out" / f"model-{i}.safetensors") for i in (1, 2))
    assert {**one, **two}.keys() == tensors.keys() and not one.keys() & two.keys()
    assert torch.equal({**one, **two}["lm_head.weight"], {**one, **two}["model.embed_tokens.weight"])


def test_refuses_models_that_do_not_belong_together(folders, tmp_path):
    wide = tiny.checkpoint(tmp_path / "wide", 0, hidden_size=32)
    with pytest.raises(CuveeError, match="wide's config.json has head_dim=16 but code's has 8"):
        blend(folders | {"wide": wide}, tmp_path, "code", "wide", out="1")
    other = shutil.copytree(folders["math"], tmp_path / "other")
    (other / "chat_template.jinja").write_text("other")
    with pytest.raises(CuveeError, match="other and code have different templates"):
        blend(folders | {"other": other}, tmp_path, "code", "other", out="2")
    lacking = shutil.copytree(folders["math"], tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, lacking / "model.safetensors")
    with pytest.raises(CuveeError, match="1 tensors are not in both .* model.norm.weight"):
        blend(folders | {"lacking": lacking}, tmp_path, "code", "lacking", out="3")
    (lacking / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CuveeError, match="can't be read"):
        blend(folders | {"lacking": lacking}, tmp_path, "code", "lacking", out="4")


@pytest.mark.parametrize(
    ("config", "models", "base", "sentence"),
    [
        ({"weights": {"cod": 1.0}}, ["code", "math"], True, "did you mean 'code'"),
        ({"method": "slerp"}, ["code", "math", "rag"], True, "merges exactly 2 models, found 3"),
        ({"method": "ties"}, ["code", "math"], False, "give the input `base`"),
        ({"method": "model_stock", "weights": {"code": 1.0}}, ["code", "math"], True, "finds its own weights"),
        ({"weights": {"code": 0.0}}, ["code"], True, "sum to 0"),
        ({"method": "ties", "options": {"densty": 0.5}}, ["code"], True, "did you mean 'density'"),
        ({"method": "ties", "options": {"density": 1.5}}, ["code"], True, "should be above 0 and at most 1"),
    ],
)
def test_check_refuses_what_no_merge_could_honour(folders, config, models, base, sentence):
    with pytest.raises(ConfigError, match=sentence):
        soup.check(soup.Config(**config), inputs(folders, *models, base=base))


def test_only_the_best_models_are_merged(tmp_path):
    from stages.merge.soup import best

    scores = {
        s: tiny.artifact(tmp_path, Kind.SCORES, metrics={"score": score})
        for s, score in zip("abc", (0.2, 0.9, 0.5), strict=True)
    }
    assert best(scores, 2) == ["b", "c"] and best(scores, 1) == ["b"]
    models = dict.fromkeys("abc")
    with pytest.raises(ConfigError, match="top: 2 chooses by scores; give the input `scores` for each of a, b, c"):
        soup.check(soup.Config(top=2), {"models": models})
    with pytest.raises(ConfigError, match="top: 4 of 3 models"):
        soup.check(soup.Config(top=4), {"models": models, "scores": scores})
    soup.check(soup.Config(method="slerp", top=2), {"models": models, "scores": scores, "base": None})
    with pytest.raises(ConfigError, match="exactly 2 models, found top 1 of 3 .a, b, c."):
        soup.check(soup.Config(method="slerp", top=1), {"models": models, "scores": scores})
    with pytest.raises(ConfigError, match="weights: top 1 may choose any of"):  # of b alone there would be no mean
        soup.check(soup.Config(weights={"b": 0.0}, top=1), {"models": models, "scores": scores})
