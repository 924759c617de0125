"""Rotary angles: Llama 3.1's frequencies, and Qwen v1's NTK-aware base and LogN scaling beyond the trained length."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.evaluation.perplexity import measure
from stages.model import parity, rope, weights
from stages.model.config import ModelConfig
from stages.model.cpu import cuda_names
from stages.model.packing import pack
from stages.rollout.engines import transformers as engines
from stages.stage import Context
from tests.parity.families import LLAMA31, QWEN2, build, export

QWEN = replace(QWEN2, rope_theta=10000.0, dynamic_ntk=True, logn_attention=True, trained_length=32)
LENGTHS = [5, 32, 33, 65, 200]  # alpha 1, 1, 3, 7, 15


def test_llama_frequencies_equal_transformers():
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for config in (LLAMA31, replace(LLAMA31, rope_theta=5e5, head_dim=128, num_attention_heads=1, hidden_size=128)):
        hf = config.to_hf()
        theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.for_model(hf.pop("model_type"), **hf), torch.device("cpu"))
        ours = rope.frequencies(config)
        assert ((ours - theirs) / theirs).abs().max() < 1e-6
        plain = rope.frequencies(replace(config, rope_scaling={}))
        kept, divided = ours / plain > 0.999, ours * 8 / plain < 1.001
        assert kept.any() and divided.any() and not (kept | divided).all()  # kept, divided by 8, and in between


def test_the_base_of_qwen_at_8192_tokens():
    config = ModelConfig(family="qwen2", head_dim=128, rope_theta=10000.0, dynamic_ntk=True, trained_length=2048)
    bases = rope.ntk_base(config, torch.tensor([1, 2048, 2049, 4096, 4097, 8192]))
    assert bases[:2].tolist() == [10000.0, 10000.0]
    assert bases[3] == bases[2] and bases[4] > bases[3]
    assert bases[5].item() == pytest.approx(10000 * 7 ** (128 / 126)) == pytest.approx(72195.86, abs=0.01)


def test_logn_of_qwen():
    config = replace(QWEN, trained_length=2048)
    assert rope.logn(config, torch.tensor([0, 2046, 2047])).tolist() == [1.0, 1.0, 1.0]
    assert rope.logn(config, torch.tensor([8191])).item() == pytest.approx(13 / 11)


def as_in_modeling_qwen(folder, tokens: torch.Tensor, prompt: int, monkeypatch) -> torch.Tensor:
    """Logits [T, V] of transformers' Qwen2 made Qwen v1's (modeling_qwen.py: `get_ntk_alpha`, `logn_list`), where the
    first `prompt` of the tokens were read at once."""
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen2 import modeling_qwen2

    trained, dim = QWEN.trained_length, QWEN.head_dim
    alpha = max(2 ** math.ceil(math.log(prompt / trained, 2) + 1) - 1, 1)
    rotation = {"rope_theta": QWEN.rope_theta * alpha ** (dim / (dim - 2)), "rope_type": "default"}
    scale = torch.tensor([math.log(i, trained) if i > trained else 1 for i in range(1, len(tokens) + 1)])[:, None]
    plain = modeling_qwen2.apply_rotary_pos_emb

    def rotate(q, k, *rotation, **options):
        q, k = plain(q, k, *rotation, **options)
        return q * scale, k

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(modeling_qwen2, "apply_rotary_pos_emb", rotate)
        options = {"rope_parameters": rotation, "attn_implementation": "eager"}
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        return model(tokens[None], use_cache=False).logits[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(QWEN, 0, tmp_path_factory.mktemp("qwen") / "model")


def logits(config, folder, training: bool) -> list[torch.Tensor]:
    model, _ = build(config, weights.Folder(folder))
    model.train(training)
    with cuda_names(), torch.no_grad():
        packed = model(torch.cat(_tokens())[None], pack(LENGTHS), torch.arange(sum(LENGTHS)))
    return list(packed.split(LENGTHS))


def _tokens() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(320, (length,), generator=generator) for length in LENGTHS]


def test_inference_beyond_the_trained_length_is_qwen_v1s(folder, monkeypatch):
    for tokens, ours in zip(_tokens(), logits(QWEN, folder, training=False), strict=True):
        theirs = as_in_modeling_qwen(folder, tokens, len(tokens), monkeypatch)
        assert (ours - theirs).abs().max() < 1e-4


def test_the_rollout_engine_writes_as_qwen_v1(folder, tmp_path, monkeypatch):
    """Prompts shorter and longer than the trained length in one batch, rows that end early."""
    engine = engines.Engine(folder, Context(scratch=tmp_path))
    prompts = [tokens[:n].tolist() for tokens, n in zip(_tokens()[::-1], (3, 40, 30, 33, 150), strict=False)]
    stop = list(range(20, 100))
    found = engine.generate(prompts, n=2, max_new_tokens=24, temperature=1.0, seed=0, stop=stop)
    assert len({len(c.ids) for completions in found for c in completions}) > 2
    for prompt, completions in zip(prompts, found, strict=True):
        for c in completions:
            theirs = as_in_modeling_qwen(folder, torch.tensor(prompt + c.ids), len(prompt), monkeypatch)
            expected = theirs.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(c.ids)[:, None])[:, 0]
            assert c.logprobs == pytest.approx(expected.tolist(), abs=2e-4)


def test_perplexity_is_that_of_qwen_v1(folder, tmp_path, monkeypatch):
    engine = engines.Engine(folder, Context(scratch=tmp_path))
    pieces = [tokens.numpy() for tokens in _tokens()]
    found = measure(engine.model, pieces, np.ones(320, np.int64), 1000)  # short and long in one batch
    nats = 0.0
    for tokens in _tokens():
        theirs = as_in_modeling_qwen(folder, tokens, len(tokens), monkeypatch)
        nats += float(torch.nn.functional.cross_entropy(theirs[:-1], tokens[1:], reduction="sum"))
    assert found["nats_per_token"] == pytest.approx(nats / (sum(LENGTHS) - len(LENGTHS)), abs=1e-5)


@pytest.mark.parametrize("options", [
    {"dynamic_ntk": True, "logn_attention": False}, {"dynamic_ntk": False, "logn_attention": True},
])  # fmt: skip
def test_options_change_inference_beyond_the_trained_length_only(options, folder):
    plain = replace(QWEN, dynamic_ntk=False, logn_attention=False)
    reference = logits(plain, folder, training=True)
    assert all(map(torch.equal, reference, logits(replace(QWEN, **options), folder, training=True)))
    for length, a, b in zip(LENGTHS, reference, logits(replace(QWEN, **options), folder, training=False), strict=True):
        same = ((a - b).abs().amax(1) < 1e-4).tolist()
        assert not any(same[32:])
        # LogN's factor goes with the position, the base with the whole document.
        assert all(same[:32]) is (length <= 32 or options["logn_attention"])


def test_the_gate_stays_within_the_trained_length():
    assert max(map(len, parity._sequences(QWEN, 0))) == QWEN.trained_length


def test_chat_answers_as_the_engine_writes(folder, tmp_path):
    from flows.chat import Speaker

    engine, speaker = engines.Engine(folder, Context(scratch=tmp_path)), Speaker(folder)
    prompt = _tokens()[-1][:150].tolist()
    ((expected,),) = engine.generate([prompt], n=1, max_new_tokens=12, temperature=0.0, seed=0, stop=list(speaker.stop))
    kept = [token for token in expected.ids if token not in speaker.stop]
    assert "".join(speaker.reply(prompt, max_new_tokens=12)) == engine.tokenizer.decode(kept, skip_special_tokens=True)
