"""Layouts that can't be built are refused in a sentence with the field; what they take of a device's memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from omegaconf import OmegaConf

from flows.config import CONF, compose
from flows.graph import Graph
from flows.plan import check_layout, table
from stages.model.config import ModelConfig
from stages.stage import ConfigError, CuveeError, parse
from stages.store.local import LocalStore
from stages.trainer.batch import Sequence
from stages.trainer.config import TrainConfig
from stages.trainer.layout import GIB, check, memory

R7B = ModelConfig()
LLAMA = replace(R7B, family="llama", sliding_window=0, logit_scale=1.0, tie_embeddings=False)


@pytest.mark.parametrize("values, world, sentence", [
    ({"tensor_parallel": 3}, 3, "tensor_parallel: 3 does not divide the model's num_attention_heads 32"),
    ({"tensor_parallel": 16}, 16, "tensor_parallel: 16 does not divide the model's num_query_groups 8"),
    ({"pipeline_parallel": 5}, 5, "pipeline_parallel: 5 does not divide the model's num_layers 32"),
    ({"pipeline_parallel": 16, "virtual_pipeline": 4}, 16, "virtual_pipeline: 64 does not divide .* num_layers 32"),
    ({"tensor_parallel": 2, "pipeline_parallel": 2}, 6, "needs a multiple of 4 processes, found 6; start more"),
    ({"sequence_parallel": True}, 1, "sequence_parallel: true, but tensor_parallel is 1"),
    ({"virtual_pipeline": 2}, 1, "virtual_pipeline: 2, but pipeline_parallel is 1"),
    ({"context_parallel": 3}, 3, "sequence_length 8192 is no multiple of 6"),
    ({"context_parallel": 16}, 16, "16 does not divide the model's num_query_groups 8, and sliding windows"),
    ({"context_parallel": 4, "tensor_parallel": 4}, 16, "context_parallel: 16 does not divide"),
    ({"context_parallel": 2}, 2, "context_parallel: 2 with precision fp32, whose attention sees whole sequences"),
    ({"fsdp": True, "distributed_optimizer": True}, 2, "distributed_optimizer: true, but fsdp shares"),
])  # fmt: skip
def test_an_impossible_layout_is_one_sentence(values, world, sentence):
    with pytest.raises(ConfigError, match=sentence) as raised:
        check(TrainConfig(**values), R7B, world, "cuda", "pretrain")
    assert str(raised.value).startswith("pretrain.") and "\n" not in str(raised.value)


@pytest.mark.parametrize("values, sentence", [
    ({"context_parallel": 2}, "context_parallel: 2 needs a GPU; set it to 1"),
    ({"recompute": "full"}, "recompute: full needs a GPU; set it to none"),
    ({"precision": "bf16"}, "precision: bf16 needs a GPU with Transformer Engine"),
])  # fmt: skip
def test_what_a_cpu_does_not_have(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check(TrainConfig(**values), R7B, 2, "cpu")
    check(TrainConfig(**{"precision": "bf16"} | values), R7B, 2, "cuda")


def test_half_precision_rotates_heads_of_powers_of_two():
    sizes = replace(R7B, hidden_size=3072, head_dim=96)
    check(TrainConfig(), sizes, 1, "cuda")
    with pytest.raises(ConfigError, match="precision: bf16 needs a head_dim that is a power of two, found 96"):
        check(TrainConfig(precision="bf16"), sizes, 1, "cuda")


def test_full_attention_shares_sequences_without_regard_to_heads():
    check(TrainConfig(context_parallel=16, precision="bf16"), LLAMA, 16, "cuda")


def test_memory_follows_the_layout():
    c = TrainConfig(precision="bf16", micro_batch_tokens=8192)
    p = R7B.parameters()
    alone = memory(c, R7B, 1)
    assert alone.weights + alone.gradients + alone.optimizer == pytest.approx(18 * p, rel=1e-3)
    shared = memory(replace(c, distributed_optimizer=True), R7B, 8)
    assert shared.optimizer == pytest.approx(12 * p / 8, rel=1e-3) and shared.weights == alone.weights
    halved = memory(replace(c, tensor_parallel=2, sequence_parallel=True), R7B, 2)
    assert halved.weights == pytest.approx(p, rel=1e-2)
    assert halved.activations == pytest.approx(alone.activations / 2)
    fsdp = memory(replace(c, fsdp=True), R7B, 8)
    assert fsdp.optimizer + fsdp.gradients == pytest.approx(12 * p / 8, rel=1e-2) and fsdp.total < shared.total
    assert memory(replace(c, recompute="full"), R7B, 1).activations < alone.activations / 10
    assert memory(replace(c, context_parallel=2), R7B, 2).activations == pytest.approx(alone.activations / 2)
    single = memory(TrainConfig(), R7B, 1)
    assert single.weights + single.gradients + single.optimizer == pytest.approx(16 * p, rel=1e-3)
    assert memory(c, R7B, 1, reference=True).weights == pytest.approx(2 * alone.weights, rel=1e-3)


@pytest.mark.parametrize("model, precision, tokens, length, measured", [
    ("1b", "bf16", 32768, 8192, 55.5), ("1b", "bf16", 65536, 8192, 91.8), ("1b", "fp8_delayed", 32768, 8192, 57.4),
    ("1b", "fp8_delayed", 65536, 8192, 93.7), ("150m", "bf16", 32768, 8192, 17.2), ("150m", "bf16", 131072, 131072, 50.2),
])  # fmt: skip
def test_memory_is_what_one_h200_took_and_a_little_more(model, precision, tokens, length, measured):
    """GiB of tests/gpu/records/2026-11-22-nvidia-h200.md, which are those of tensors."""
    sizes = parse(ModelConfig, OmegaConf.to_container(OmegaConf.load(CONF / f"model/{model}.yaml")), "model")
    found = memory(TrainConfig(precision=precision, micro_batch_tokens=tokens, sequence_length=length), sizes, 1)
    assert measured <= (found.total - found.reserved) / GIB <= 1.15 * measured


def test_memory_of_a_large_vocabulary_and_of_a_long_context():
    c = TrainConfig(precision="bf16", micro_batch_tokens=8192)
    assert memory(c, R7B, 1).working > 6 * R7B.vocab_size * R7B.hidden_size  # the output layer's gradient, FP32 and BF16
    long = TrainConfig(precision="bf16", tensor_parallel=8, sequence_parallel=True, recompute="full", micro_batch_tokens=262144)
    assert memory(long, R7B, 8).working > 2 * 2 * 262144 * R7B.hidden_size  # a block's input and its gradient on every rank


def test_a_pipeline_holds_no_more_microbatches_than_a_step_has():
    c = compose(["scale=h100x512", "cluster=h100x512"])
    config = Graph(c).nodes["pretrained"].config
    few = replace(config, batch_tokens=8192 * 8, virtual_pipeline=1)  # one for each of the 8 replicas
    many = replace(config, virtual_pipeline=1)
    assert memory(few, config.model, 512).activations == pytest.approx(memory(many, config.model, 512).activations / 8)


@pytest.mark.parametrize("name", ["h100x1", "h100x8", "h100x512"])
def test_every_scale_fits_its_cluster(name, tmp_path):
    graph = Graph(compose([f"scale={name}", f"cluster={name}"]))
    lines = list(table(LocalStore(tmp_path), graph, graph.until([])))
    assert len(lines) == len(graph.nodes) + 4
    limit = graph.conf.cluster.memory_gib * GIB
    assert all(check_layout(node, graph.conf.cluster) <= limit for node in graph.nodes.values() if node.distributed)
    assert graph.nodes["sft-math"].config.precision == "bf16"


def test_the_report_s_figures_at_full_size():
    config = Graph(compose(["scale=h100x512", "cluster=h100x512"])).nodes["base"].config
    assert config.phases == [[8192, 30_000], [32768, 10_000], [131072, 5_000], [262144, 5_000]] and config.long_every == 4
    assert (config.lr, config.min_lr, config.schedule) == (2.5e-4, 1e-6, "linear")
    assert {config.precision_at(step) for step in (0, 29_999, 49_999)} == {"bf16"}


@pytest.mark.parametrize("overrides, sentence", [
    (["cluster=h100x8"], "pretrain.tensor_parallel 8 x pipeline_parallel 8 .* multiple of 64 processes, found 8"),
    (["cluster=h100x8", "pretrain.pipeline_parallel=1", "pretrain.virtual_pipeline=1"],
     r"pretrain: sequences of 8192 take .* GiB .* but cluster=h100x8 has 79; raise tensor_parallel or pipeline_parallel"),
    (["cluster=h100x512", "pretrain.pipeline_parallel=3"], "pretrain.pipeline_parallel x virtual_pipeline: 6 does not divide"),
    (["cluster=h100x512", "cooldown.recompute=none"], "cooldown: sequences of 32768 take .*; set recompute to full"),
    (["cluster=local"], "pretrain.precision: bf16 needs a GPU"),
    (["cluster=h100x512", "instruct.sequence_length=262145"],
     "instruct.sequence_length: 262145 is longer than the model's max_position_embeddings 262144; shorten"),
])  # fmt: skip
def test_a_plan_that_cannot_run_names_what_to_change(overrides, sentence, tmp_path):
    graph = Graph(compose(["scale=h100x512", *overrides]))
    with pytest.raises(ConfigError, match=sentence):
        list(table(LocalStore(tmp_path), graph, graph.until([])))


def test_fp8_needs_columns_by_sixteen():
    narrow = replace(R7B, num_attention_heads=32, num_query_groups=8, head_dim=8, hidden_size=256)
    check(TrainConfig(tensor_parallel=8, precision="bf16"), narrow, 8, "cuda")
    with pytest.raises(ConfigError, match="tensor_parallel x 16: 128 does not divide the model's num_query_groups in columns"):
        check(TrainConfig(tensor_parallel=8, precision_phases=[["bf16", 1], ["fp8_delayed", 1]]), narrow, 8, "cuda")
    # Phases stand in the place of `precision`: none of these steps computes in FP8.
    check(TrainConfig(tensor_parallel=8, precision="fp8_delayed", precision_phases=[["bf16", 1]]), narrow, 8, "cuda")


@pytest.mark.parametrize("overrides, sentence", [
    (["pretrain.batch_tokens=32768"], "pretrain.batch_tokens: 32768 tokens in sequences of 8192 cannot be shared among 8 "
     "data-parallel ranks with 8 microbatches each, which virtual_pipeline takes; raise it"),
    (["cooldown.batch_tokens=1048576"], "cooldown.batch_tokens: 1048576 tokens in sequences of 262144 cannot be shared among 8"),
    (["instruct.batch_groups=4"], "instruct.batch_groups: 4 cannot be shared among 8 data-parallel ranks; raise it"),
])  # fmt: skip
def test_a_step_too_small_for_the_ranks(overrides, sentence, tmp_path):
    graph = Graph(compose(["scale=h100x512", "cluster=h100x512", *overrides]))
    with pytest.raises(ConfigError, match=sentence):
        list(table(LocalStore(tmp_path), graph, graph.until([])))


def test_launchers_refuse_what_they_cannot_start():
    from flows import open_launcher

    for overrides, sentence in (
        (["cluster.launcher=torchrn"], "cluster.launcher: 'torchrn' is not known; did you mean 'torchrun'"),
        (["cluster.devices=2"], "cluster.devices: 2, but launcher local starts one process"),
        (["cluster=h100x512"], "cluster=h100x512 has 64 hosts"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            open_launcher(compose(overrides))


def test_a_batch_that_cannot_be_shared():
    from stages.trainer.microbatch import Sharing, microbatches

    groups = [[Sequence(np.arange(4, dtype=np.int32), np.ones(4, np.float32))]] * 3
    with pytest.raises(CuveeError, match="3 groups cannot be shared among 4 data-parallel ranks"):
        microbatches(groups, 64, 8, 8, Sharing(ranks=4))


def test_clusters_have_the_same_fields_and_stages_that_train_are_distributed():
    import yaml

    from flows.config import CONF, stage_names
    from stages.stage import load

    fields = {path.stem: set(yaml.safe_load(path.read_text())) for path in (CONF / "cluster").glob("*.yaml")}
    assert all(found >= fields["local"] for found in fields.values())  # a launcher may have fields of its own
    for name in stage_names():
        assert getattr(load(name), "DISTRIBUTED", False) == issubclass(load(name).Config, TrainConfig), name
