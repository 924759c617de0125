"""One model in training on Megatron-core: gradient steps, log-probabilities, weights out, state to resume from."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from stages.model import weights
from stages.model.config import ModelConfig
from stages.model.cpu import cuda_names, keep_freed_memory
from stages.model.folder import read_config
from stages.model.megatron import set_precision
from stages.model.model import Model
from stages.stage import CuveeError
from stages.trainer import checkpoint, parallel
from stages.trainer.batch import Group, Loss, Packed
from stages.trainer.config import TrainConfig
from stages.trainer.fsdp import Sharded, ShardedAdam, as_main_weights
from stages.trainer.microbatch import Microbatch, Sharing, microbatches
from stages.trainer.optimizer import Optimizer

GPU_ROWS = 128  # tokens of a microbatch on a GPU are a multiple: FP8 needs 16, and few shapes need few kernels


class Trainer:
    """A policy (or reward model, or value network), its optimizer, and an optional frozen reference.

    head: "lm"; "reward", a score of each sequence at its last token; "value", a score where each target is predicted.
    critic: a value network that is saved and resumed with the policy, if its owner sets one.
    init: folder of the first weights; without it they are drawn from config.seed. Everything here is a collective
    over all ranks. Raises CuveeError where weights and sizes do not fit.
    """

    def __init__(
        self,
        config: TrainConfig,
        sizes: ModelConfig,
        objective: Callable[[Packed], Loss],
        init: Path | None = None,
        head: str = "lm",
        reference: Path | None = None,
    ):
        self.config, self.sizes, self.objective, self.head = config, sizes, objective, head
        self.critic: Trainer | None = None
        self._stepping = False
        head = "lm" if head == "lm" else "reward"  # the model's
        with cuda_names():
            parallel.initialise(config, sizes)
            self.device = parallel.device()
            if self.device.type == "cpu":
                keep_freed_memory()
            self.rows = weights.table(sizes, head)
            exact: dict[torch.nn.Parameter, Tensor] = {}
            self.chunks = self._model(sizes, head, init, exact)
            self.wrapped = self._wrap(self.chunks)
            if config.fsdp:
                self.optimizer = ShardedAdam(config, sizes, self.chunks)
            else:
                self.optimizer = Optimizer(config, sizes, self.wrapped, exact)
            self.reference = None
            if reference is not None:
                self.reference = self._model(read_config(reference), "lm", reference, None)
                for chunk in self.reference:
                    chunk.requires_grad_(False)
        self._schedule = get_forward_backward_func()
        # FP64 is exact, but on a GPU would make every gradient's division a slow mixed one.
        exact_type = torch.float32 if self.device.type == "cuda" else torch.float64
        self._count = torch.zeros((), dtype=exact_type, device=self.device)

    def _model(self, sizes: ModelConfig, head: str, folder: Path | None, exact: dict | None) -> list[Model]:
        """This rank's chunks of a model (one, but for a virtual pipeline), with its weights."""
        c = self.config
        virtual, precision = c.virtual_pipeline, c.precision_at(0)
        if exact is None and precision != "fp32":  # a reference, of which no checkpoint keeps FP8's scales
            precision = "bf16"
        chunks = [
            Model(
                sizes, head, precision=precision, tensor_parallel=c.tensor_parallel,
                pipeline_parallel=c.pipeline_parallel, virtual_pipeline=virtual, context_parallel=c.context_parallel,
                sequence_parallel=c.sequence_parallel, recompute=c.recompute, vp_stage=i if virtual > 1 else None,
            ).to(self.device)
            for i in range(virtual)
        ]  # fmt: skip
        if c.dropout and exact is not None:
            self._drop(chunks)
        if c.fsdp and exact is not None:  # the model in training
            as_main_weights(chunks)
        rows = weights.table(sizes, head)
        source: Any = weights.Initial(rows, c.seed)
        if folder is not None:
            found = weights.Folder(folder)
            new = [row for row in rows if row.name == weights.SCORE and row.name not in found]  # a reward head on a language model
            weights.check(rows, found, str(folder))
            source = ChainMap({row.name: source[row.name] for row in new}, found)
        weights.load(chunks, rows, source, exact)
        return chunks

    def _drop(self, chunks: list[Model]) -> None:
        """Dropout of what each layer adds to the residual stream, Megatron-core's hidden_dropout, while a step goes forward."""

        def drop(module: torch.nn.Module, given: Any, added: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
            return (torch.nn.functional.dropout(added[0], self.config.dropout), added[1]) if self._stepping else None

        for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
            layer.self_attention.register_forward_hook(drop)
            layer.mlp.register_forward_hook(drop)

    def _wrap(self, chunks: list[Model]) -> list[Any]:
        """The chunks with FP32 gradients, reduced among data-parallel ranks while the backward pass goes on."""
        for chunk in chunks:  # each has a configuration of its own; the schedule reads the first
            chunk.config.finalize_model_grads_func = self._finalize
        if self.config.fsdp:
            return [Sharded(chunk, self.config.precision_at(0) != "fp32") for chunk in chunks]
        replicas = dist.get_world_size(parallel_state.get_data_parallel_group(with_context_parallel=True))
        # A reward head leaves the last pipeline stage's copy of the embedding unused, for whose gradient it would wait.
        overlap = self.device.type == "cuda" and replicas > 1 and self.head == "lm"
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=overlap,
            use_distributed_optimizer=self.config.distributed_optimizer,
        )  # fmt: skip
        wrapped = [DistributedDataParallel(c.config, settings, c, disable_bucketing=i > 0) for i, c in enumerate(chunks)]
        if overlap:
            syncs = [w.no_sync for w in wrapped]
            chunks[0].config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
        return wrapped

    def set_precision(self, name: str) -> None:
        """The format of matrix products from the next step on; FP8 and BF16 may follow each other at any step."""
        for chunk in self.chunks:  # the reference stays: no checkpoint keeps FP8's scales of it
            set_precision(chunk.config, name)
        if self.critic:
            self.critic.set_precision(name)

    def step(self, groups: list[Group], lr: float, limit: float = math.inf) -> dict[str, float]:
        """One optimizer step on `groups`: the sum of the objective's sums over the sum of its counts.

        Returns loss, grad_norm, tokens, skipped (1.0 where a NaN or infinite loss or gradient, or a loss above `limit`,
        left the weights as they were) and the objective's metrics.
        """
        batch = self._microbatches(self._filled(groups))
        self._attach_reference(batch)
        with cuda_names():
            for chunk in self.wrapped:
                chunk.zero_grad_buffer()
            self.optimizer.zero()
            self._count.zero_()
            self._stepping = True
            logs = self._run(self.wrapped, batch, self._objective, forward_only=False)
            self._stepping = False
            norm = self.optimizer.norm()  # waits for the GPU; what follows reads what is there
            found = _totals(logs)
            loss = found.pop("loss", (math.nan, 1.0))
            loss = loss[0] / loss[1] if loss[1] else math.nan
            if usable := math.isfinite(loss) and loss <= limit and math.isfinite(norm):
                self.optimizer.step(lr, norm)
        tokens = sum(len(sequence.tokens) for group in groups for sequence in group)
        metrics = {name: total / count for name, (total, count) in found.items() if count}
        return {"loss": loss, "grad_norm": norm, "tokens": float(tokens), "skipped": float(not usable), **metrics}

    def logprobs(self, groups: list[Group]) -> list[np.ndarray]:
        """Current log-probabilities of every sequence, in order: float32 [T - 1], token t given those before,
        t = 1..T-1; 0 where the mask is 0."""
        return self._logprobs(self.chunks, groups)

    def reference_logprobs(self, groups: list[Group]) -> list[np.ndarray]:
        """The same under the frozen reference model. Raises CuveeError without one."""
        if self.reference is None:
            raise CuveeError("this run has no reference model: the objective's NEEDS_REFERENCE is not set")
        return self._logprobs(self.reference, groups)

    def values(self, groups: list[Group]) -> list[np.ndarray]:
        """A value network's output, as `logprobs`: float32 [T - 1], where token t is predicted."""
        return self._logprobs(self.chunks, groups)

    def hf_state(self) -> dict[str, Tensor]:
        """A copy of the weights by Hugging Face names, FP32, on every rank."""
        return weights.state(self.chunks, self.rows, self.optimizer.main)

    def save_weights(self, out: Path) -> None:
        """Write the safetensors of a Hugging Face folder to `out`, from rank 0."""
        weights.save(self.chunks, self.rows, out, self.optimizer.main)

    def save_state(self, checkpoints: checkpoint.Checkpoints, step: int, mark: dict[str, Any]) -> None:
        """Save what training goes on from, as it is now, to be committed with `mark`; see Checkpoints.save."""
        with cuda_names():
            checkpoints.save(step, self._sharded_state(False), mark)

    def load_state(self, path: Path) -> None:
        """Go back to the checkpoint at `path`, bit for bit."""
        with cuda_names():
            checkpoint.check_kind(path, self.optimizer.kind)
            state = checkpoint.load(path, self._sharded_state(True))
            self.optimizer.load(self._named(), state)
            if self.critic:
                self.critic.optimizer.load(self.critic._named(), state["critic"])

    def _named(self) -> dict[str, Model]:
        """The chunks under the names that Megatron-core's optimizer knows in a state dict."""
        several = len(self.chunks) > 1
        return {f"model{i}" if several else "model": chunk for i, chunk in enumerate(self.chunks)}

    def _sharded_state(self, loading: bool) -> dict[str, Any]:
        state = self.optimizer.sharded_state(self._named(), loading) | {"kind": self.optimizer.kind}
        if self.critic:
            state["critic"] = self.critic._sharded_state(loading)
            add_prefix_for_sharding(state["critic"], "critic.")
        return state

    def _microbatches(self, groups: list[Group]) -> list[Microbatch]:
        c = self.config
        sharing = Sharing(
            rank=parallel_state.get_data_parallel_rank(), ranks=parallel_state.get_data_parallel_world_size(),
            context_rank=parallel_state.get_context_parallel_rank(), context_ranks=c.context_parallel,
            align=math.lcm(GPU_ROWS if self.device.type == "cuda" else 1, c.tensor_parallel if c.sequence_parallel else 1),
            turns=c.pipeline_parallel if c.virtual_pipeline > 1 else 0, device=self.device,
        )  # fmt: skip
        return microbatches(
            groups, c.micro_batch_tokens, self.sizes.vocab_size, self.sizes.max_position_embeddings, sharing
        )

    def _run(self, chunks: list[Any], batch: list[Microbatch], after: Callable, forward_only: bool) -> list[Any]:
        """Megatron-core's schedule over this rank's microbatches; what `after` stored, on the last pipeline stage."""
        reward = self.head == "reward" and chunks is not self.reference
        iterators = [iter(batch) for _ in chunks]
        return self._schedule(
            forward_step_func=partial(self._forward, reward=reward, after=after),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(batch),
            seq_length=batch[0].tokens.shape[1] * self.config.context_parallel,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _forward(self, batches: Iterator[Microbatch], model: Any, reward: bool, after: Callable) -> tuple[Tensor, Callable]:
        batch = next(batches)
        rows, targets = (batch.last, None) if reward else (batch.rows, None if self.head == "value" else batch.targets)

        def finish(output: Tensor) -> Any:
            return after(batch, _whole(batch, output, reward))

        return model(batch.tokens, batch.packing, rows, targets), finish

    def _objective(self, batch: Microbatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The objective on one microbatch, in the schedule's form: loss sum, its own (unused) token count, log."""
        reward = self.head == "reward"
        loss = self.objective(
            Packed(
                logprobs=output if self.head == "lm" else output.new_zeros(len(batch.mask)),
                mask=batch.mask,
                sequence=batch.sequence,
                group=batch.group,
                fields=batch.fields,
                reference=batch.reference,
                behaviour=batch.behaviour,
                teacher=batch.teacher,
                scores=output if reward else None,
                values=output if self.head == "value" else None,
                token_fields=batch.token_fields,
            )
        )
        count = torch.as_tensor(loss.count, dtype=self._count.dtype, device=self.device).detach()
        self._count += count / self.config.context_parallel  # each context-parallel rank has counted the whole
        log = {"loss": (loss.sum.detach(), count)}
        for name, value in loss.metrics.items():
            log[name] = value if isinstance(value, tuple) else (value, count)
        return loss.sum, torch.zeros((), dtype=torch.int), log

    def _finalize(self, model: list[Any], unused: Any, **options: Any) -> None:
        """Reduce gradients and divide them by the count: the objective's own, which need not be a whole number."""
        finalize_model_grads(model, self._count, **options)

    def _attach_reference(self, batch: list[Microbatch]) -> None:
        if self.reference is None:
            return
        with cuda_names(), torch.no_grad():
            outputs = self._run(self.reference, batch, _keep, forward_only=True)
        for microbatch, (_, logprobs) in zip(batch, outputs, strict=False):  # none on earlier pipeline stages
            microbatch.reference = logprobs

    def _shortage(self, groups: list[Group]) -> int:
        """How many groups more it takes to give every rank's pipeline one."""
        c = self.config
        turns = c.pipeline_parallel if c.virtual_pipeline > 1 else 1
        return max(0, parallel_state.get_data_parallel_world_size() * turns - len(groups))

    def _filled(self, groups: list[Group]) -> list[Group]:
        """`groups`, and where there are too few for the ranks some without targets, which teach nothing. A stream may have
        fewer at some steps (a document that reaches into the next, conversations that are too long)."""
        if self.head == "reward":  # scores need no targets: nothing could be left out
            return groups
        empty = [replace(sequence, mask=np.zeros_like(sequence.mask)) for sequence in groups[0]]
        return [*groups, *[empty] * self._shortage(groups)]

    def _logprobs(self, chunks: list[Model], groups: list[Group]) -> list[np.ndarray]:
        batch = self._microbatches([*groups, *[groups[0]] * self._shortage(groups)])
        with cuda_names(), torch.no_grad():
            outputs = self._run(chunks, batch, _keep, forward_only=True)
        sequences = [sequence for group in groups for sequence in group]
        found = [np.zeros(max(len(s.tokens) - 1, 0), np.float32) for s in sequences]
        for part in _gather([(b.numbers, b.sequence.cpu().numpy(), b.places, o.cpu().numpy()) for b, o in outputs]):
            for numbers, sequence, places, values in part:
                for i, number in enumerate(numbers):
                    if number >= len(found):
                        continue
                    mine = sequence == i
                    found[number][places[mine]] = values[mine]
        return found


class _AllContext(torch.autograd.Function):
    """Values of this context-parallel rank's `here` -> the [n] of all ranks."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, here: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(here)
        whole = values.new_zeros(n).index_copy_(0, here, values)
        dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def _whole(batch: Microbatch, output: Tensor, reward: bool) -> Tensor:
    """The last pipeline stage's output for all targets (sequences of a reward head): objectives sum over sequences, which
    context parallelism cuts. Every context-parallel rank then has the same loss, and the gradient of its own share."""
    if batch.here is None:
        return output
    here, n = (batch.last_here, len(batch.numbers)) if reward else (batch.here, len(batch.mask))
    return _AllContext.apply(output, here, n)


def _keep(batch: Microbatch, output: Tensor) -> tuple[Tensor, Tensor, Any]:
    return output.sum(), torch.zeros((), dtype=torch.int), (batch, output)


def _totals(logs: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """name -> (sum, count) over microbatches and data-parallel ranks, on every rank; read from the device at once."""
    values = [value for log in logs for pair in log.values() for value in pair]
    tensors = [value.detach().double().reshape(()) for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    numbers = iter([next(read) if isinstance(value, Tensor) else float(value) for value in values])
    found: dict[str, tuple[float, float]] = {}
    for part in _gather([{name: (next(numbers), next(numbers)) for name in log} for log in logs]):
        for log in part:
            for name, (total, count) in log.items():
                before = found.get(name, (0.0, 0.0))
                found[name] = (before[0] + total, before[1] + count)
    return found


def _gather(mine: list[Any]) -> list[list[Any]]:
    """`mine` of every data-parallel rank's last pipeline stage, once each, on every rank."""
    if dist.get_world_size() == 1:
        return [mine]
    repeated = parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_context_parallel_rank()
    if repeated or not parallel_state.is_pipeline_last_stage():
        mine = []
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts
