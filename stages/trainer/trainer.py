"""One model in training on Megatron-core: gradient steps, log-probabilities, weights out, state to resume from."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from stages.model import cohere2, weights
from stages.model.config import ModelConfig
from stages.model.cpu import cuda_names, keep_freed_memory
from stages.model.folder import read_config
from stages.model.model import Model
from stages.stage import CuveeError
from stages.trainer import checkpoint, parallel
from stages.trainer.batch import Group, Loss, Packed
from stages.trainer.config import TrainConfig
from stages.trainer.microbatch import Microbatch, microbatches

SCORE = "score.weight"


class Trainer:
    """A policy (or reward model), its optimizer, and an optional frozen reference.

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
        with cuda_names():
            parallel.initialise(config)
            if not torch.cuda.is_available():
                keep_freed_memory()
            self.rows = cohere2.table(sizes, head)
            model = self._model(sizes, head, init)
            self.ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
            self.optimizer = self._optimizer()
            self.reference = None
            if reference is not None:
                self.reference = self._model(read_config(reference), "lm", reference).requires_grad_(False)
        self.model = model
        model.config.finalize_model_grads_func = self._finalize
        self._schedule = get_forward_backward_func()
        self._count = 0.0

    def _model(self, sizes: ModelConfig, head: str, folder: Path | None) -> Model:
        c = self.config
        model = Model(
            sizes, head, tensor_parallel=c.tensor_parallel, pipeline_parallel=c.pipeline_parallel,
            sequence_parallel=c.sequence_parallel,
        )  # fmt: skip
        rows = cohere2.table(sizes, head)
        source: Any = weights.Initial(rows, c.seed)
        if folder is not None:
            found = weights.Folder(folder)
            new = [row for row in rows if row.name == SCORE and SCORE not in found]  # a reward head on a language model
            weights.check([row for row in rows if row not in new], found, str(folder))
            source = ChainMap({row.name: source[row.name] for row in new}, found)
        weights.load(model, rows, source)
        return model

    def _optimizer(self) -> Any:
        c = self.config
        settings = OptimizerConfig(
            optimizer="adam", lr=c.lr, min_lr=c.min_lr, weight_decay=c.weight_decay, adam_beta1=c.beta1,
            adam_beta2=c.beta2, adam_eps=c.epsilon, clip_grad=c.clip_grad,
        )  # fmt: skip
        optimizer = get_megatron_optimizer(settings, [self.ddp])
        for group in optimizer.param_groups:
            # Megatron-core leaves this product to its own scheduler. wd_mult is 0 for norms.
            group["weight_decay"] = c.weight_decay * group["wd_mult"]
            group["fused"] = True
        self._adam_state(optimizer)
        return optimizer

    @staticmethod
    def _adam_state(optimizer: Any) -> None:
        """Create what torch's AdamW would create at its first step: saving and loading need it before."""
        adam = optimizer.optimizer
        for group in adam.param_groups:
            for p in group["params"]:
                state = adam.state[p]
                state.setdefault("step", torch.zeros((), dtype=torch.float32))
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(p))

    def step(self, groups: list[Group], lr: float) -> dict[str, float]:
        """One optimizer step on `groups`: the sum of the objective's sums over the sum of its counts.

        Returns loss, grad_norm, tokens, skipped (1.0 where a NaN or infinite loss or gradient left the weights as they
        were) and the objective's metrics.
        """
        batch = self._microbatches(groups)
        self._attach_reference(batch)
        with cuda_names():
            self.ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            self._count = 0.0
            logs = self._run(self.ddp, batch, self._objective, forward_only=False)
            found = _totals(logs)
            loss = found.pop("loss", (math.nan, 1.0))
            loss = loss[0] / loss[1] if loss[1] else math.nan
            norm = self._update(lr, math.isfinite(loss))
        tokens = sum(len(sequence.tokens) for group in groups for sequence in group)
        metrics = {name: total / count for name, (total, count) in found.items() if count}
        skipped = float(not (math.isfinite(loss) and math.isfinite(norm)))
        return {"loss": loss, "grad_norm": norm, "tokens": float(tokens), "skipped": skipped, **metrics}

    def _update(self, lr: float, usable: bool) -> float:
        """Clip and step with the accumulated gradients, if loss and gradients are finite; the gradient norm."""
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if usable and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            if self.config.clip_grad > 0 and (parameters := self.optimizer.chained_optimizers[0].get_parameters()):
                clip_grad_by_total_norm_fp32(parameters, self.config.clip_grad, norm)
            self.optimizer.step_with_ready_grads()
        return norm

    def logprobs(self, groups: list[Group]) -> list[np.ndarray]:
        """Current log-probabilities of every sequence, in order: float32 [T - 1], token t given those before,
        t = 1..T-1; 0 where the mask is 0."""
        return self._logprobs(self.model, groups)

    def reference_logprobs(self, groups: list[Group]) -> list[np.ndarray]:
        """The same under the frozen reference model. Raises CuveeError without one."""
        if self.reference is None:
            raise CuveeError("this run has no reference model: the objective's NEEDS_REFERENCE is not set")
        return self._logprobs(self.reference, groups)

    def hf_state(self) -> dict[str, Tensor]:
        """A copy of the weights by Hugging Face names, FP32, on every rank."""
        return weights.state(self.model, self.rows)

    def save_weights(self, out: Path) -> None:
        """Write the safetensors of a Hugging Face folder to `out`, from rank 0."""
        weights.save(self.model, self.rows, out)

    def save_state(self, folder: Path, step: int, progress: dict[str, Any]) -> None:
        """Write a checkpoint to resume from, and commit it."""
        with cuda_names():
            checkpoint.save(folder, step, self._sharded_state(False), progress)

    def load_state(self, path: Path) -> dict[str, Any]:
        """Go back to the checkpoint at `path`, bit for bit; returns the progress it was committed with."""
        with cuda_names():
            state, progress = checkpoint.load(path, self._sharded_state(True))
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._adam_state(self.optimizer)
        return progress

    def _sharded_state(self, loading: bool) -> dict[str, Any]:
        model = self.model.sharded_state_dict()
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model, is_loading=loading)}

    def _microbatches(self, groups: list[Group]) -> list[Microbatch]:
        c = self.config
        return microbatches(
            groups, c.micro_batch_tokens, self.sizes.vocab_size, self.sizes.max_position_embeddings,
            parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size(),
            c.tensor_parallel if c.sequence_parallel else 1,
        )  # fmt: skip

    def _run(self, model: Any, batch: list[Microbatch], after: Callable, forward_only: bool) -> list[Any]:
        """Megatron-core's schedule over this rank's microbatches; what `after` stored, on the last pipeline stage."""
        return self._schedule(
            forward_step_func=partial(self._forward, after=after),
            data_iterator=iter(batch),
            model=[model],
            num_microbatches=len(batch),
            seq_length=batch[0].tokens.shape[1],
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _forward(self, batches: Iterator[Microbatch], model: Any, after: Callable) -> tuple[Tensor, Callable]:
        batch = next(batches)
        reward = self.head == "reward" and model is not self.reference
        rows, targets = (batch.last, None) if reward else (batch.rows, batch.targets)
        return model(batch.tokens, batch.packing, rows, targets), partial(after, batch)

    def _objective(self, batch: Microbatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The objective on one microbatch, in the schedule's form: loss sum, its own (unused) token count, log."""
        reward = self.head == "reward"
        loss = self.objective(
            Packed(
                logprobs=output.new_zeros(len(batch.mask)) if reward else output,
                mask=batch.mask,
                sequence=batch.sequence,
                group=batch.group,
                fields=batch.fields,
                reference=batch.reference,
                scores=output if reward else None,
            )
        )
        count = float(loss.count)
        self._count += count
        log = {"loss": (loss.sum.detach(), count)}
        for name, value in loss.metrics.items():
            log[name] = value if isinstance(value, tuple) else (value, count)
        return loss.sum, torch.zeros((), dtype=torch.int), log

    def _finalize(self, model: list[Any], unused: Any, **options: Any) -> None:
        """Reduce gradients and divide them by the count: the objective's own, which need not be a whole number."""
        finalize_model_grads(model, torch.tensor(self._count, dtype=torch.float64), **options)

    def _attach_reference(self, batch: list[Microbatch]) -> None:
        if self.reference is None:
            return
        with cuda_names(), torch.no_grad():
            outputs = self._run(self.reference, batch, _keep, forward_only=True)
        for microbatch, (_, logprobs) in zip(batch, outputs, strict=False):  # none on earlier pipeline stages
            microbatch.reference = logprobs

    def _logprobs(self, model: Model, groups: list[Group]) -> list[np.ndarray]:
        with cuda_names(), torch.no_grad():
            outputs = self._run(model, self._microbatches(groups), _keep, forward_only=True)
        sequences = [sequence for group in groups for sequence in group]
        found = [np.zeros(max(len(s.tokens) - 1, 0), np.float32) for s in sequences]
        for part in _gather(
            [(b.numbers, b.sequence.numpy(), b.rows.numpy(), b.last.numpy(), o.numpy()) for b, o in outputs]
        ):
            for numbers, sequence, rows, last, values in part:
                for i, number in enumerate(numbers):
                    mine = sequence == i
                    found[number][rows[mine] - (last[i] - len(found[number]))] = values[mine]
        return found


def _keep(batch: Microbatch, output: Tensor) -> tuple[Tensor, Tensor, Any]:
    return output.sum(), torch.zeros((), dtype=torch.int), (batch, output)


def _totals(logs: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """name -> (sum, count) over microbatches and data-parallel ranks, on every rank."""
    found: dict[str, tuple[float, float]] = {}
    for part in _gather([{k: (float(a), float(b)) for k, (a, b) in log.items()} for log in logs]):
        for log in part:
            for name, (total, count) in log.items():
                before = found.get(name, (0.0, 0.0))
                found[name] = (before[0] + total, before[1] + count)
    return found


def _gather(mine: list[Any]) -> list[list[Any]]:
    """`mine` of every data-parallel rank's last pipeline stage, once each, on every rank."""
    if dist.get_world_size() == 1:
        return [mine]
    if parallel_state.get_tensor_model_parallel_rank() or not parallel_state.is_pipeline_last_stage():
        mine = []
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts
