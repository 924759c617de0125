"""What every gradient step is configured with. Imports no torch.

A training stage's Config inherits from TrainConfig and adds its own fields, so that `pretrain.lr=1e-3` and
`expert.math.sft.lr=1e-4` read alike. How many sequences make a step is the stream's business: pretraining
adds `batch_tokens`, post-training adds `batch_groups`.
"""

from dataclasses import dataclass

from stages.stage import ConfigError, option, placement

SCHEDULES = ("constant", "linear", "cosine", "wsd")


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
    beta1: float = option(0.9, "AdamW's first moment decay")
    beta2: float = option(0.95, "AdamW's second moment decay")
    epsilon: float = option(1e-8, "AdamW's epsilon")
    clip_grad: float = option(1.0, "largest global gradient norm; 0 does not clip")
    max_skipped: int = option(5, "consecutive steps with a NaN or infinite loss or gradient before giving up")
    micro_batch_tokens: int = placement(8192, "most tokens of a microbatch; a longer group is a microbatch alone")
    save_every: int = placement(200, "steps between checkpoints to resume from; 0 saves only on SIGTERM")
    log_every: int = placement(20, "steps between log lines")
    tensor_parallel: int = placement(1, "ranks that share each matrix")
    sequence_parallel: bool = placement(False, "also share the norms' activations among tensor-parallel ranks")
    pipeline_parallel: int = placement(1, "ranks that share the layers")

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
        for name in ("sequence_length", "micro_batch_tokens", "tensor_parallel", "pipeline_parallel", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{at}{name}: {getattr(self, name)} is not a positive number; give at least 1")
        for name in ("lr", "weight_decay", "clip_grad", "min_lr", "warmup_steps", "save_every", "max_skipped"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{at}{name}: {getattr(self, name)} is negative; give 0 or more")
