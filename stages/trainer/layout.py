"""Whether a model can be shared among devices as configured, and what it takes of their memory. Imports no torch.

A layout is tensor x pipeline x context x data parallel; the first three are configured, data parallel is the rest of the
processes. `check` refuses what cannot be built, before anything is.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.model.config import ModelConfig
from stages.stage import ConfigError
from stages.trainer.config import TrainConfig

GIB = 2**30
RESERVED = 2 * GIB  # of a GPU: CUDA's context, NCCL's buffers, workspaces of kernels, fragmentation
HEAD_KEPT = 4 * GIB  # most of the derivative by the logits that the output layer on a GPU keeps (model/head_cuda.py)
HEAD_CHUNK = 0.75 * GIB  # its logits of a chunk of rows in FP32, and their derivative


def check(
    config: TrainConfig, sizes: ModelConfig, world: int, device: str = "cpu", where: str = "", longest: int = 0
) -> None:
    """Raises ConfigError where `world` processes on `device` ("cpu" or "cuda") cannot hold the model as configured.

    `where` is put before the field's name. longest: tokens of the longest sequence, by default config's. Memory is not
    looked at here, see `memory`.
    """
    at = f"{where}." if where else ""
    if longest > sizes.max_position_embeddings:
        raise ConfigError(
            f"{at}sequence_length: {longest} is longer than the model's max_position_embeddings "
            f"{sizes.max_position_embeddings}; shorten it, or extend the context before"
        )
    _check_sizes(config, sizes, at, longest or config.sequence_length)
    _check_features(config, device, at)
    if config.precision_at(0) != "fp32" and sizes.head_dim & (sizes.head_dim - 1):
        raise ConfigError(
            f"{at}precision: {config.precision_at(0)} needs a head_dim that is a power of two, found {sizes.head_dim}; set "
            "it to fp32 or choose another head_dim"
        )
    tensor, pipeline, context = config.tensor_parallel, config.pipeline_parallel, config.context_parallel
    shards = tensor * pipeline * context
    if world % shards:
        raise ConfigError(
            f"{at}tensor_parallel {tensor} x pipeline_parallel {pipeline} x context_parallel {context} needs a multiple of "
            f"{shards} processes, found {world}; start more of them or lower one of the three"
        )


def check_batch(config: TrainConfig, world: int, longest: int, where: str = "") -> None:
    """Raises ConfigError where a step of a stage's config may have too few sequences (of `longest` tokens) for the ranks:
    better now than at the first such step. Stages say how much a step is as batch_groups or batch_tokens."""
    ranks = world // (config.tensor_parallel * config.pipeline_parallel * config.context_parallel)
    turns = config.pipeline_parallel if config.virtual_pipeline > 1 else 1
    field = "batch_groups" if hasattr(config, "batch_groups") else "batch_tokens"
    amount = getattr(config, field)
    if (amount if field == "batch_groups" else amount // longest) < ranks * turns:
        each = "" if field == "batch_groups" else f" tokens in sequences of {longest}"
        raise ConfigError(
            f"{where}.{field}: {amount}{each} cannot be shared among {ranks} data-parallel ranks"
            + (f" with {turns} microbatches each, which virtual_pipeline takes" if turns > 1 else "")
            + "; raise it, or share a model among more ranks"
        )


def _check_sizes(config: TrainConfig, sizes: ModelConfig, at: str, longest: int) -> None:
    def divides(field: str, parts: int, of: str, whole: int, why: str = "") -> None:
        if whole % parts:
            raise ConfigError(f"{at}{field}: {parts} does not divide the model's {of} {whole}{why}; choose a divisor")

    for of in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
        divides("tensor_parallel", config.tensor_parallel, of, getattr(sizes, of))
    if config.fp8:
        for of in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
            width = getattr(sizes, of) * (1 if of == "ffn_hidden_size" else sizes.head_dim)
            divides("tensor_parallel x 16", 16 * config.tensor_parallel, f"{of} in columns", width, ", which FP8 needs")
    stages = config.pipeline_parallel * config.virtual_pipeline
    field = "pipeline_parallel" if config.virtual_pipeline == 1 else "pipeline_parallel x virtual_pipeline"
    divides(field, stages, "num_layers", sizes.num_layers)
    if config.context_parallel > 1:
        if longest % (2 * config.context_parallel):
            raise ConfigError(
                f"{at}context_parallel: {config.context_parallel} ranks take 2 pieces of a sequence each, but "
                f"sequence_length {longest} is no multiple of {2 * config.context_parallel}; change one"
            )
        if any(not sizes.full_attention(i) for i in range(sizes.num_layers)):
            # Windows need whole sequences a head: heads are exchanged for tokens, as tensor parallel shares them.
            parts = config.tensor_parallel * config.context_parallel
            why = ", and sliding windows share heads among context-parallel ranks"
            divides("tensor_parallel x context_parallel", parts, "num_query_groups", sizes.num_query_groups, why)


def _check_features(config: TrainConfig, device: str, at: str) -> None:
    if config.sequence_parallel and config.tensor_parallel == 1:
        raise ConfigError(
            f"{at}sequence_parallel: true, but tensor_parallel is 1; set it to false or share the matrices"
        )
    if config.virtual_pipeline > 1 and config.pipeline_parallel == 1:
        raise ConfigError(f"{at}virtual_pipeline: {config.virtual_pipeline}, but pipeline_parallel is 1; set it to 1")
    if config.fsdp and config.distributed_optimizer:
        raise ConfigError(
            f"{at}distributed_optimizer: true, but fsdp shares the optimizer's state already; set it to false"
        )
    if device != "cpu" and config.context_parallel > 1 and config.precision_at(0) == "fp32":
        raise ConfigError(
            f"{at}context_parallel: {config.context_parallel} with precision fp32, whose attention sees whole sequences; "
            "set context_parallel to 1 or precision to bf16"
        )
    if device == "cpu":
        for field, value in (("context_parallel", 1), ("recompute", "none")):
            if getattr(config, field) != value:
                raise ConfigError(f"{at}{field}: {getattr(config, field)} needs a GPU; set it to {value} on a CPU")
        if (precision := config.precision_at(0)) != "fp32":
            raise ConfigError(
                f"{at}precision: {precision} needs a GPU with Transformer Engine; choose a cluster that has "
                "one, e.g. cluster=h100x1, or set it to fp32"
            )


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device of a layout."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    reserved: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working + self.reserved

    def describe(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations", "working")
        return ", ".join(f"{name} {getattr(self, name) / GIB:,.1f}" for name in parts) + " GiB"

    def advice(self, config: TrainConfig, world: int) -> str:
        """Which number to change first where this does not fit."""
        if self.activations + self.working > self.total / 2:
            if config.recompute != "full":
                return "set recompute to full or lower micro_batch_tokens"
            return "raise context_parallel, or lower micro_batch_tokens or sequence_length"
        if world == 1:
            return "choose a smaller model or a larger cluster"
        if not config.distributed_optimizer and not config.fsdp:
            return "set distributed_optimizer to true or raise tensor_parallel or pipeline_parallel"
        shared = "" if config.fsdp else ", set fsdp to true instead of distributed_optimizer"
        return f"raise tensor_parallel or pipeline_parallel{shared}, or take more devices"


def memory(config: TrainConfig, sizes: ModelConfig, world: int, longest: int = 0, reference: bool = False) -> Memory:
    """Memory on the fullest device (the first pipeline stage) of `world`; an estimate, meant to err on the safe side.

    longest: tokens of the longest sequence, by default config's. reference: a frozen reference model stands beside.
    Bytes a parameter: FP32 4 (weight) + 4 (gradient) + 8 (Adam); otherwise 2 + 4 + 12, as main weights are FP32, and 2
    more for FP8's copies; an anchor has 4 more beside Adam's. The distributed optimizer shares the last, FSDP all of it,
    among the ranks with the same weights; FSDP gathers two layers and the embedding.
    """
    half = config.precision_at(0) != "fp32"
    tensor, pipeline, context = config.tensor_parallel, config.pipeline_parallel, config.context_parallel
    replicas = max(1, world // (tensor * pipeline))  # of these weights, context-parallel ranks included
    embedding = sizes.vocab_size * sizes.hidden_size / tensor
    layer = sizes.parameters() - sizes.vocab_size * sizes.hidden_size * (1 if sizes.tie_embeddings else 2)
    layer /= sizes.num_layers * tensor
    held = layer * sizes.num_layers / pipeline + embedding * (2 if pipeline == 1 and not sizes.tie_embeddings else 1)
    weights, gradients, optimizer = (2 * held, 4 * held, 12 * held) if half else (4 * held, 4 * held, 8 * held)
    anchor = 4 * held if config.anchor else 0
    optimizer += anchor
    if config.fsdp:
        gathered = (2 if half else 4) * (embedding + 2 * layer)
        weights, gradients, optimizer = 4 * held / replicas + gathered, 4 * held / replicas, (8 * held + anchor) / replicas
    elif config.distributed_optimizer:
        optimizer /= replicas
    if config.fp8:  # each rank keeps them of the whole layers, with FSDP too
        weights += 2 * (held - embedding)
    if reference:
        weights += (2 if half else 4) * held
    whole = max(config.micro_batch_tokens, longest or config.sequence_length)
    activations = _activations(config, sizes, world, whole) * (2 if half else 4)
    logits = whole / context * sizes.vocab_size / tensor
    # The output layer also holds its weight's gradient before it is added to the others.
    head = min(2 * logits, HEAD_KEPT) + min(6 * logits, HEAD_CHUNK) + 6 * embedding if half else 4 * (logits + embedding)
    working = max(head, whole / context * _backward(config, sizes) * (2 if half else 4))
    return Memory(weights, gradients, optimizer, activations, working, RESERVED if half else 0)


def _activations(config: TrainConfig, sizes: ModelConfig, world: int, tokens: int) -> float:
    """Elements that the first pipeline stage keeps for backward passes, in microbatches of `tokens`.

    It holds as many microbatches of its layers as there are stages, and with interleaved stages 1 + (p - 1) / (p v) times
    the model's layers (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.3), but not more than a step has.
    """
    pipeline, virtual = config.pipeline_parallel, config.virtual_pipeline
    held = pipeline if virtual == 1 else pipeline + (pipeline - 1) / virtual  # microbatches of its own layers
    if batch := getattr(config, "batch_tokens", 0):
        held = min(held, max(1, batch * config.tensor_parallel * pipeline * config.context_parallel / world / tokens))
    layers = held * sizes.num_layers / pipeline
    each = _layer(config, sizes)
    boundary = sizes.hidden_size / (config.tensor_parallel if config.sequence_parallel else 1)
    kept = layers * boundary + each if config.recompute == "full" else layers * each
    return tokens / config.context_parallel * kept


def _backward(config: TrainConfig, sizes: ModelConfig) -> float:
    """Elements a token that come and go in the backward pass of an MLP: the gradients of what SwiGLU gives and takes and
    of the block's input, which sequence parallelism also gathers from the ranks."""
    return 3 * sizes.ffn_hidden_size / config.tensor_parallel + sizes.hidden_size * (1 + config.sequence_parallel)


def _layer(config: TrainConfig, sizes: ModelConfig) -> float:
    """Activations that one layer keeps for its backward pass, elements a token: its inputs and norms (shared among
    tensor-parallel ranks only with sequence parallel), Q, K, V and their rotated copies, attention's output, the MLP's
    gate and up products and what SwiGLU makes of them. Attention keeps no scores (flash attention)."""
    queries, keys = sizes.num_attention_heads * sizes.head_dim, sizes.num_query_groups * sizes.head_dim
    norms = 2 if sizes.traits.parallel_block else 4
    outside = norms * sizes.hidden_size / (config.tensor_parallel if config.sequence_parallel else 1)
    rotated = queries + keys if config.recompute != "selective" else 0
    inside = (queries + 2 * keys) + rotated + queries + 3 * sizes.ffn_hidden_size
    return outside + inside / config.tensor_parallel
