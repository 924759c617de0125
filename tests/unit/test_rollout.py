"""The rollout engine writes what transformers would, its log-probabilities are true, and a bad sync is caught."""

import copy

import numpy as np
import pytest
import torch
from post_helpers import context, save_checkpoint

from stages.rollout.engines import transformers as engines
from stages.rollout.engines._engine import parity
from stages.stage import CuveeError

STOP = 8


@pytest.fixture(scope="module", params=["shrinking batch", "fixed shapes"])
def engine(request, tmp_path_factory):
    """On a CPU, and with the logic that a GPU replays from graphs."""
    folder = tmp_path_factory.mktemp("engine")
    engine = engines.Engine(save_checkpoint(folder / "model", std=0.4), context(folder / "scratch"))
    engine.fixed_shapes = request.param == "fixed shapes"
    return engine


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(20, 270, length).tolist() for length in (3, 30, 11, 1, 19)]  # shorter and longer than a window


def full_forward(engine, prompt, completion):
    return engine.logprobs([prompt + completion.ids])[0][len(prompt) - 1 :]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_equal_a_full_forward_pass(engine, prompts, temperature):
    found = engine.generate(prompts, n=3, max_new_tokens=24, temperature=temperature, seed=1, stop=[STOP])
    for prompt, completions in zip(prompts, found, strict=True):
        assert len(completions) == 3
        for c in completions:
            assert c.logprobs == pytest.approx(full_forward(engine, prompt, c).tolist(), abs=2e-4)


def test_greedy_equals_generate(engine, prompts):
    found = engine.generate(prompts, n=1, max_new_tokens=24, temperature=0.0, seed=0, stop=[STOP])
    for prompt, (completion,) in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = engine.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=STOP,
            pad_token_id=0,
            suppress_tokens=list(range(len(engine.tokenizer), 320)),
        )
        assert completion.ids == expected[0, len(prompt) :].tolist()


def test_half_precision_samples_with_its_own_log_probabilities(engine, prompts, tmp_path):
    half = engines.Engine(save_checkpoint(tmp_path / "m", std=0.1), context(tmp_path / "s"))
    half.model.bfloat16()
    half.fixed_shapes = engine.fixed_shapes
    found = half.generate(prompts, n=2, max_new_tokens=12, temperature=1.0, seed=1, stop=[STOP])
    for prompt, completions in zip(prompts, found, strict=True):
        for c in completions:
            assert c.logprobs == pytest.approx(full_forward(half, prompt, c).tolist(), abs=0.05)


def test_stops_at_a_stop_token_and_leaves_it_out_of_the_text(engine, prompts):
    """Half the vocabulary stops: rows end at different steps and leave the batch."""
    stop = list(range(0, 276, 4))
    found = engine.generate(prompts * 4, n=5, max_new_tokens=24, temperature=1.0, seed=2, stop=stop)
    lengths = [len(c.ids) for completions in found for c in completions]
    assert len(set(lengths)) > 4
    for prompt, completions in zip(prompts * 4, found, strict=True):
        for c in completions:
            assert c.ids[-1] in stop or len(c.ids) == 24
            assert not set(c.ids[:-1]) & set(stop)
            assert c.text == engine.tokenizer.decode(c.ids[:-1] if c.ids[-1] in stop else c.ids)
            assert c.logprobs == pytest.approx(full_forward(engine, prompt, c).tolist(), abs=2e-4)


def test_reproducible_from_the_seed_whatever_the_batch(engine, prompts, monkeypatch):
    draw = lambda seed: engine.generate(prompts, n=2, max_new_tokens=12, temperature=1.0, seed=seed, stop=[STOP])  # noqa: E731
    first = draw(5)
    assert draw(5) == first
    assert draw(6) != first
    assert first[0][0].ids != first[0][1].ids
    for device in engines.ROWS:
        monkeypatch.setitem(engines.ROWS, device, 2)
    monkeypatch.setattr(engine, "slots", None)
    assert [[c.ids for c in row] for row in draw(5)] == [[c.ids for c in row] for row in first]


def test_samples_follow_the_model(engine):
    """Frequencies of 4000 first tokens against the model's probabilities (total variation), at two temperatures."""
    prompt = [40, 41, 42]
    with torch.inference_mode():
        logits = engine.model(torch.tensor([prompt])).logits[0, -1, : len(engine.tokenizer)]
    for temperature in (1.0, 0.5):
        rows = engine.generate([prompt], n=4000, max_new_tokens=1, temperature=temperature, seed=3, stop=[])[0]
        counts = np.bincount([c.ids[0] for c in rows], minlength=len(logits)) / 4000
        expected = (logits / temperature).softmax(-1).numpy()
        noise = np.sqrt(expected / 4000).sum() / 2
        assert np.abs(counts - expected).sum() / 2 < 1.2 * noise


def test_never_chooses_ids_without_text(engine):
    """The embedding has 320 rows, the tokenizer 276 tokens."""
    rows = engine.generate([[40, 41]], n=2000, max_new_tokens=1, temperature=5.0, seed=3, stop=[])[0]
    assert max(c.ids[0] for c in rows) < len(engine.tokenizer) < engine.model.config.vocab_size


def weights(engine):
    return {k: v.clone() for k, v in engine.model.state_dict().items() if k != "lm_head.weight"}


def test_weights_of_another_shape_are_refused_and_none_is_taken(engine):
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in weights(engine).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CuveeError, match=f"of another shape .'{name}'"):
        engine.sync_weights(state | {name: state[name][:-1]})
    assert all(torch.equal(tensor, before[key]) for key, tensor in engine.model.state_dict().items())


def test_greedy_and_sampled_calls_share_their_slots(engine, prompts):
    """Each with graphs of its own temperature."""
    if not engine.fixed_shapes:
        pytest.skip("a batch on a CPU has no slots")
    call = lambda t: engine.generate(prompts, n=2, max_new_tokens=6, temperature=t, seed=4, stop=[STOP])  # noqa: E731
    sampled, slots = call(1.0), engine.slots
    greedy = call(0.0)
    assert engine.slots is slots and greedy != sampled and call(1.0) == sampled
    assert all(first.ids == second.ids for first, second in greedy)


def test_sync_takes_over_new_weights(engine, prompts, tmp_path):
    state = weights(engine)
    own = engines.Engine(save_checkpoint(tmp_path / "m", std=0.4, seed=9), context(tmp_path / "s"), state)
    assert parity(own, prompts[:3], engine.logprobs(prompts[:3]), state) < 1e-5
    with pytest.raises(CuveeError, match="missing.*model.norm.weight"):
        own.sync_weights({k: v for k, v in state.items() if k != "model.norm.weight"})


@pytest.mark.parametrize(
    "name, group", [("model.layers.2.mlp.up_proj.weight", "layers.2.mlp"), ("model.norm.weight", "norm")]
)
def test_parity_probe_names_the_corrupted_tensor(engine, prompts, tmp_path, name, group):
    state = weights(engine)
    state[name].view(-1)[3] += 0.5
    own = engines.Engine(save_checkpoint(tmp_path / "m"), context(tmp_path / "s"), state)
    with pytest.raises(CuveeError, match=f"the tensor group {group} differs most"):
        parity(own, prompts, engine.logprobs(prompts), weights(engine))


def test_parity_probe_tells_apart_a_wrong_forward_pass(engine, prompts):
    other = copy.copy(engine)
    other.model = copy.deepcopy(engine.model)
    other.model.logit_scale = 0.3
    with pytest.raises(CuveeError, match="forward passes disagree"):
        parity(engine, prompts, other.logprobs(prompts), weights(engine))
