"""The training loop of every stage with gradients: resume, steps, checkpoints, log, the finished folder."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from stages.model import folder
from stages.model.config import ModelConfig
from stages.run import AGAIN
from stages.stage import ConfigError, Context, CuveeError
from stages.trainer import checkpoint
from stages.trainer.batch import Group, Loss, Packed
from stages.trainer.config import TrainConfig
from stages.trainer.trainer import Trainer

NOTHING = {"loss": math.nan, "grad_norm": 0.0, "tokens": 0.0, "skipped": 0.0}  # metrics of a step without groups
RECENT = 50  # closing metrics are means over at most so many last steps, and at most a tenth of the run


class Stream(Protocol):
    def batch(self, step: int, trainer: Trainer) -> list[Group]:
        """The groups of optimizer step `step` (from 0): a function of the seed, the step and the trainer's weights.
        None where there is nothing to learn from (every completion rewarded alike): the step leaves the weights."""
        ...


@dataclass
class Progress:
    """What a resumed run must know besides weights and optimizer. step: steps done. recent: metrics of the last ones."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    streak: int = 0
    first_loss: float = math.nan
    recent: list[dict[str, float]] = field(default_factory=list)


def train(
    *,
    config: TrainConfig,
    stream: Stream,
    objective: Callable[[Packed], Loss],
    out: Path,
    ctx: Context,
    tokenizer: Path,
    model: ModelConfig | None = None,
    init: Path | None = None,
    head: str = "lm",
    reference: Path | None = None,
) -> dict[str, float]:
    """Train for config.steps and write the CHECKPOINT folder (REWARD_MODEL for head "reward") to `out`.

    model: sizes; by default those of `init`. Goes on from the newest checkpoint in ctx.scratch, with the same result,
    bit for bit, as an uninterrupted run on a CPU with as many threads. SIGTERM saves and exits with status AGAIN.
    Returns the closing metrics: means over the last steps, tokens seen, steps skipped.
    Raises CuveeError after config.max_skipped steps in a row without a finite loss and gradient.
    """
    config.check()
    if model is None and init is None:
        raise ConfigError("model: give the model's sizes or a checkpoint to start from")
    sizes = model or folder.read_config(init)
    sizes.check()
    folder.check_vocabulary(tokenizer, sizes)
    trainer = Trainer(config, sizes, objective, init, head, reference)
    checkpoints = ctx.scratch / "checkpoints"
    progress = Progress()
    if found := checkpoint.committed(checkpoints):
        progress = Progress(**trainer.load_state(found[-1]))
        ctx.log(f"resumed after step {progress.step}/{config.steps}")
    with _stop_requests() as stop:
        _loop(config, stream, trainer, progress, checkpoints, ctx, stop)
    trainer.save_weights(out)
    if dist.get_rank() == 0:
        folder.write(out, sizes, tokenizer)
    dist.barrier()
    return _closing(progress)


def _loop(
    config: TrainConfig, stream: Stream, trainer: Trainer, progress: Progress, checkpoints: Path, ctx: Context,
    stop: threading.Event,
) -> None:  # fmt: skip
    pace = _Pace(config, progress)
    window = max(1, min(RECENT, config.steps // 10))
    while progress.step < config.steps:
        step, lr = progress.step, config.learning_rate(progress.step)
        # Randomness is a function of (seed, step), so that there is no generator to save.
        torch.manual_seed(config.seed * 1_000_003 + step)
        groups = stream.batch(step, trainer)
        metrics = trainer.step(groups, lr) if groups else dict(NOTHING)
        progress.step += 1
        progress.tokens += int(metrics.pop("tokens"))
        _count_skipped(config, progress, metrics)
        if math.isnan(progress.first_loss):
            progress.first_loss = metrics["loss"]
        progress.recent = [*progress.recent, metrics][-window:]
        rate = pace.rate(progress)
        if dist.get_rank() == 0:
            ctx.metrics(progress.step, **metrics, lr=lr, tokens_per_second=rate)
            if progress.step % config.log_every == 0 or progress.step in (1, config.steps):
                ctx.log(_line(config, progress, metrics, lr, rate, pace.eta(progress)))
        stopping = _anywhere(stop.is_set())
        every, last = config.save_every, progress.step == config.steps > config.save_every
        if stopping or (every and (progress.step % every == 0 or last)):
            trainer.save_state(checkpoints, progress.step, asdict(progress))
        if stopping:
            ctx.log(f"stopped on request after step {progress.step}/{config.steps}; saved, start again to go on")
            raise SystemExit(AGAIN)


def _count_skipped(config: TrainConfig, progress: Progress, metrics: dict[str, float]) -> None:
    skipped = int(metrics.pop("skipped"))
    progress.skipped += skipped
    progress.streak = progress.streak + 1 if skipped else 0
    if progress.streak > config.max_skipped:
        raise CuveeError(
            f"max_skipped: the loss or its gradient was NaN or infinite in {progress.streak} steps in a row, up to step "
            f"{progress.step} (loss {metrics['loss']}, gradient norm {metrics['grad_norm']}); lower lr {config.lr:g} or "
            "look at the data of these steps"
        )


def _closing(progress: Progress) -> dict[str, float]:
    """Means over the recent steps in which a metric was finite, and the run's totals."""
    names = sorted({name for metrics in progress.recent for name in metrics})
    found = {}
    for name in names:
        values = [m[name] for m in progress.recent if math.isfinite(m.get(name, math.nan))]
        if values:
            found[name] = sum(values) / len(values)
    totals = {"steps": progress.step, "tokens": progress.tokens, "skipped": progress.skipped}
    return {**found, "loss_first": progress.first_loss, **{k: float(v) for k, v in totals.items()}}


def _line(
    config: TrainConfig, progress: Progress, metrics: dict[str, float], lr: float, rate: float, eta: float
) -> str:
    shown = f"{lr:.1e}".replace("e-0", "e-")
    return (
        f"step {progress.step}/{config.steps} loss {metrics['loss']:.4g} lr {shown} norm {metrics['grad_norm']:.3g} "
        f"tokens/s {rate:,.0f} eta {eta:.0f}s"
    )


class _Pace:
    """Tokens a second and time to the end, from this process's own steps; the first (warming up) counts only alone."""

    def __init__(self, config: TrainConfig, progress: Progress):
        self.config = config
        self._mark(progress)
        self.warm = False

    def _mark(self, progress: Progress) -> None:
        self.start, self.tokens, self.step = time.perf_counter(), progress.tokens, progress.step

    def rate(self, progress: Progress) -> float:
        elapsed = time.perf_counter() - self.start
        rate = (progress.tokens - self.tokens) / max(elapsed, 1e-9)
        self.seconds = elapsed / max(progress.step - self.step, 1)
        if not self.warm:
            self._mark(progress)
            self.warm = True
        return rate

    def eta(self, progress: Progress) -> float:
        return self.seconds * (self.config.steps - progress.step)


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that SIGTERM sets. Outside the main thread, where no handler can be set, it stays unset."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _anywhere(flag: bool) -> bool:
    """Whether `flag` is set on any rank, so that all stop after the same step."""
    if dist.get_world_size() == 1:
        return flag
    seen = torch.tensor(int(flag))
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    return bool(seen)
