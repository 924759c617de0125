"""What every gradient step is configured with. Imports no torch.

A training stage's Config inherits from TrainConfig and adds its own fields, so that `pretrain.lr=1e-3` and
`expert.math.sft.lr=1e-4` read alike. How many sequences make a step is the stream's business: pretraining
adds `batch_tokens`, post-training adds `batch_groups`.
"""

from dataclasses import dataclass
from typing import Any

from stages.stage import ConfigError, option, placement, unknown

SCHEDULES = ("constant", "linear", "cosine", "wsd")
PRECISIONS = ("fp32", "bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise")
RECOMPUTE = ("none", "selective", "full")


@dataclass
class TrainConfig:
    steps: int = option(1000, "optimizer steps")
    sequence_length: int = option(8192, "longest sequence in tokens")
    seed: int = option(0, "seed of initial weights and data order")
    lr: float = option(3e-4, "peak learning rate")
    min_lr: float = option(0.0, "learning rate at the last step (schedule constant: not used)")
    warmup_steps: int = option(0, "steps of linear warmup from 0")
    schedule: str = option("cosine", "shape of the learning rate after warmup", SCHEDULES)
    decay_steps: int = option(0, "last steps that decay linearly to min_lr (schedule wsd only)")
    weight_decay: float = option(0.1, "decoupled weight decay; norms are excluded")
    anchor: float = option(0.0, "pull back to the first weights, decoupled as weight decay is (L2-SP); norms included")
    dropout: float = option(0.0, "share of what attention and MLP add to the hidden states that a step's forward pass sets to 0")
    beta1: float = option(0.9, "AdamW's first moment decay")
    beta2: float = option(0.95, "AdamW's second moment decay")
    epsilon: float = option(1e-8, "AdamW's epsilon")
    clip_grad: float = option(1.0, "largest global gradient norm; 0 does not clip")
    max_skipped: int = option(5, "consecutive steps with a NaN or infinite loss or gradient before giving up")
    spike_factor: float = option(
        0.0, "a loss above this many times the median of recent losses is a spike: logged and counted; 0 = off"
    )
    skip_spikes: bool = option(False, "also skip the update of a spike, as of a NaN")
    precision: str = option("fp32", "arithmetic of the matrix products; main weights stay FP32", PRECISIONS)
    precision_phases: list[Any] = option(
        [], "[[precision, steps], ...] in turn, e.g. of FP8 with a BF16 cooldown; empty = `precision` throughout"
    )
    micro_batch_tokens: int = placement(8192, "most tokens of a microbatch; a longer group is a microbatch alone")
    save_every: int = placement(200, "steps between checkpoints to resume from; 0 saves only on SIGTERM")
    keep_every: int = placement(
        0, "steps between checkpoints kept until the run is published; 0 keeps the newest two alone"
    )
    async_save: bool = placement(True, "write checkpoints while training goes on, from a copy in host memory")
    log_every: int = placement(20, "steps between log lines")
    profile_steps: list[int] = placement([], "[first, last] steps (from 1) of which profile_dir gets a trace")
    profile_dir: str = placement("", "folder for the trace (Chrome's format) of profile_steps")
    prefetch: bool = placement(True, "build the next step's batch while this one trains, where the stream allows it")
    tensor_parallel: int = placement(1, "ranks that share each matrix")
    sequence_parallel: bool = placement(False, "also share the norms' activations among tensor-parallel ranks")
    pipeline_parallel: int = placement(1, "ranks that share the layers")
    virtual_pipeline: int = placement(1, "model chunks a pipeline rank; more make the pipeline's bubble smaller")
    context_parallel: int = placement(1, "ranks that share each sequence")
    distributed_optimizer: bool = placement(False, "share optimizer state among data-parallel ranks")
    fsdp: bool = placement(False, "share weights and gradients among data-parallel ranks too")
    recompute: str = placement("none", "activations computed again in the backward pass", RECOMPUTE)

    def placed(self, step: int) -> "TrainConfig":
        """This configuration with the placement of step `step`; between different ones the process starts again."""
        return self

    def precision_at(self, step: int) -> str:
        """Precision of optimizer step `step` (from 0)."""
        for name, steps in self.precision_phases:
            if step < steps:
                return name
            step -= steps
        return self.precision

    @property
    def fp8(self) -> bool:
        """Whether any step computes in FP8."""
        return any(name.startswith("fp8") for name, _ in self.precision_phases or [(self.precision, self.steps)])

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0): warmup, then `schedule`, ending at min_lr.

        wsd is warmup, stable, linear decay in the last `decay_steps` (Hu et al. 2024, MiniCPM).
        """
        import math

        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        start = self.steps - self.decay_steps if self.schedule == "wsd" else self.warmup_steps
        # The last step (steps - 1) is exactly at min_lr.
        done = min(max(step - start, 0) / max(self.steps - 1 - start, 1), 1.0)
        weight = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1.0 - done
        return self.min_lr + (self.lr - self.min_lr) * weight

    def check(self, where: str = "") -> None:
        """Raises ConfigError for values that no run could honour; `where` is put before the field's name."""
        at = f"{where}." if where else ""
        if self.steps < 1:
            raise ConfigError(f"{at}steps: {self.steps} trains nothing; give at least 1")
        if self.warmup_steps >= self.steps and self.warmup_steps:
            raise ConfigError(f"{at}warmup_steps: {self.warmup_steps} leaves no step of {self.steps}; give fewer")
        if self.schedule == "wsd" and not 0 < self.decay_steps <= self.steps - self.warmup_steps:
            raise ConfigError(
                f"{at}decay_steps: {self.decay_steps}, but schedule wsd needs 1 to {self.steps - self.warmup_steps}"
                " (steps - warmup_steps)"
            )
        positive = ("sequence_length", "micro_batch_tokens", "tensor_parallel", "pipeline_parallel", "virtual_pipeline",
                    "context_parallel", "log_every")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{at}{name}: {getattr(self, name)} is not a positive number; give at least 1")
        counts = ("lr", "weight_decay", "anchor", "clip_grad", "min_lr", "warmup_steps", "decay_steps", "save_every",
                  "max_skipped", "keep_every", "seed")  # fmt: skip
        for name in counts:
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{at}{name}: {getattr(self, name)} is negative; give 0 or more")
        for name, kind in (("beta1", "decay of a moment"), ("beta2", "decay of a moment"), ("dropout", "share")):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{at}{name}: {getattr(self, name)} is no {kind}; give 0 or more, below 1")
        if not self.epsilon > 0:
            raise ConfigError(f"{at}epsilon: {self.epsilon} lets AdamW divide by 0; give more than 0")
        if self.spike_factor and not self.spike_factor > 1:
            raise ConfigError(
                f"{at}spike_factor: {self.spike_factor} calls ordinary losses spikes; give more than 1, or 0"
            )
        self._check_precision(at)
        self._check_profile(at)

    def _check_precision(self, at: str) -> None:
        phases = self.precision_phases
        if not phases:
            return
        for phase in phases:
            if not isinstance(phase, list) or len(phase) != 2 or not isinstance(phase[1], int) or phase[1] < 1:
                raise ConfigError(
                    f"{at}precision_phases: {phase!r} is no phase; give [precision, steps], at least 1 step"
                )
            if phase[0] not in PRECISIONS:
                raise ConfigError(f"{at}precision_phases: {unknown(str(phase[0]), list(PRECISIONS))}")
        found = {name for name, _ in phases}
        if "fp32" in found and len(found) > 1:
            raise ConfigError(
                f"{at}precision_phases: {phases} mixes fp32 with others, which no model can; choose one kind"
            )
        if (total := sum(steps for _, steps in phases)) != self.steps:
            raise ConfigError(f"{at}steps: {self.steps}, but precision_phases {phases} have {total}; make them agree")

    def _check_profile(self, at: str) -> None:
        if not self.profile_steps:
            return
        if len(self.profile_steps) != 2 or not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ConfigError(f"{at}profile_steps: {self.profile_steps} should be [first, last], counted from 1")
        if self.profile_steps[1] > self.steps:
            raise ConfigError(
                f"{at}profile_steps: {self.profile_steps} end after the last step {self.steps}; give earlier"
            )
        if not self.profile_dir:
            raise ConfigError(
                f"{at}profile_dir: profile_steps {self.profile_steps} need a folder to write to; give one"
            )
