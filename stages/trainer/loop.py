"""The training loop of every stage with gradients: resume, steps, checkpoints, log, the finished folder."""

from __future__ import annotations

import json
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from stages.model import folder
from stages.model.config import ModelConfig
from stages.run import AGAIN, OK
from stages.stage import Context, CuveeError, identity
from stages.trainer import parallel
from stages.trainer.batch import Group, Loss, Packed
from stages.trainer.checkpoint import Checkpoints, newest
from stages.trainer.config import TrainConfig
from stages.trainer.meter import Meter, Trace
from stages.trainer.trainer import Trainer

NOTHING = {"loss": math.nan, "grad_norm": 0.0, "tokens": 0.0, "skipped": 0.0}  # metrics of a step without groups
RECENT = 50  # closing metrics are means over at most so many last steps, and at most a tenth of the run
SPIKE_STEPS = 32  # recent losses whose median a spike is measured by; half of them must be known
FIRST_LOSS = 0.3  # how far, relative to ln(vocabulary), the first loss of a new model may be without a warning


class Critic(Protocol):
    """A value network: the folder of its first weights, and what it minimises."""

    init: Path

    def objective(self, batch: Packed) -> Loss: ...


class Stream(Protocol):
    """A stream may also have `prefetchable` = True, where a batch is a function of the step alone and may be built in
    a thread, and `fingerprint`, which tells its data from others when a run goes on."""

    def batch(self, step: int, trainer: Trainer) -> list[Group]:
        """The groups of optimizer step `step` (from 0): a function of the seed, the step and the trainer's weights.
        Empty where there is nothing to learn from (every completion rewarded alike): the step leaves the weights."""
        ...


@dataclass
class Progress:
    """What a resumed run must know besides weights and optimizer. step: steps done. recent: metrics of the last ones.
    losses: the last ones that trained the weights, kept only with spike_factor."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    streak: int = 0
    spikes: int = 0
    first_loss: float = math.nan
    recent: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


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
    critic: Critic | None = None,
) -> dict[str, float]:
    """Train for config.steps and write the CHECKPOINT folder (REWARD_MODEL for head "reward") to `out`.

    model: sizes; by default those of `init`. critic: of a value network, which the stream trains as `trainer.critic`; its
    checkpoints are the policy's, and it is not published. Goes on from the newest whole checkpoint in ctx.scratch, with the same
    result, bit for bit, as an uninterrupted run on a CPU with as many threads. SIGTERM saves and exits with status
    AGAIN. Returns the closing metrics: means over the last steps, tokens seen, steps skipped.
    Raises CuveeError after config.max_skipped steps in a row that were skipped, and for checkpoints that are all
    damaged, or of another model or data; ConfigError for a layout or precision that these processes can't have.
    """
    config.check()
    sizes = model or folder.read_config(init)
    sizes.check()
    folder.check_vocabulary(tokenizer, sizes)
    parallel.join()
    log = (lambda _: None) if dist.get_rank() else ctx.log
    checkpoints = Checkpoints(ctx.scratch / "checkpoints", config.keep_every, config.async_save, ctx.mirror)
    made_by = {"model": identity(sizes), "data": getattr(stream, "fingerprint", "")}
    found, progress = newest(checkpoints.folder, log), Progress()
    if found:
        path, mark = found
        _check_same(path, mark, made_by)
        progress = Progress(**mark["progress"])
    placed = config.placed(min(progress.step, config.steps - 1))
    trainer = Trainer(placed, sizes, objective, init, head, reference)
    if critic is not None:
        trainer.critic = Trainer(placed, folder.read_config(critic.init), critic.objective, critic.init, "value")
    if found:
        trainer.load_state(path)
        log(f"resumed after step {progress.step}/{config.steps}")
    run = _Run(config, placed, trainer, checkpoints, progress, ctx, log, made_by, Meter(sizes, head), init is None)
    with _stop_requests() as stop, _batches(placed, stream, trainer) as batch:
        run.go(batch, stop)
    trainer.save_weights(out)
    if dist.get_rank() == 0:
        folder.write(out, sizes, tokenizer)
    dist.barrier()
    if dist.get_rank():
        raise SystemExit(OK)  # what a stage does with the finished model, its first process does alone
    return _closing(progress)


def _check_same(path: Path, mark: dict[str, Any], made_by: dict[str, Any]) -> None:
    ours, theirs = json.loads(json.dumps(made_by["model"])), mark["model"]
    other = [f"{k} {theirs.get(k)} instead of {ours.get(k)}" for k in sorted({*ours, *theirs})
             if ours.get(k) != theirs.get(k)]  # fmt: skip
    if mark["data"] != made_by["data"]:
        other.append(f"data {mark['data'][:12]} instead of {made_by['data'][:12]}")
    if other:
        raise CuveeError(
            f"{path}: this checkpoint was made with {', '.join(other)}; go back to that configuration, or remove "
            f"{path.parent} to start from the beginning"
        )


@dataclass
class _Run:
    """The steps of one process. config: as placed for the first of them; whole: for all of the run."""

    whole: TrainConfig
    config: TrainConfig
    trainer: Trainer
    checkpoints: Checkpoints
    progress: Progress
    ctx: Context
    log: Callable[[str], None]
    made_by: dict[str, Any]
    meter: Meter
    fresh: bool

    def go(self, batch: Callable[[int], list[Group]], stop: threading.Event) -> None:
        config, progress = self.config, self.progress
        trace = Trace(config)
        precision = config.precision_at(0)  # what the trainer was built with
        while progress.step < config.steps:
            if config.precision_at(progress.step) != precision:
                precision = config.precision_at(progress.step)
                self.trainer.set_precision(precision)
                self.log(f"precision is {precision} from step {progress.step + 1} on")
            trace.before(progress.step)
            self._step(batch)
            trace.after(progress.step - 1)
            mirroring = self.checkpoints.mirroring
            stopping, writing, busy = _anywhere(stop.is_set(), self.checkpoints.writing, mirroring.busy)
            if not writing:
                self.checkpoints.commit()
            if not busy:
                mirroring.go_on()
            moving = progress.step < config.steps and self.whole.placed(progress.step) != config
            if stopping or moving or self._due():
                mark = {"progress": asdict(progress), **self.made_by}
                self.trainer.save_state(self.checkpoints, progress.step, mark)
            if stopping or moving:
                self.checkpoints.wait(mirrored=True)
                why = "stopped on request" if stopping else "the next phase is placed otherwise: stopped"
                self.log(f"{why} after step {progress.step}/{config.steps}; saved, start again to go on")
                raise SystemExit(AGAIN)
        self.checkpoints.wait()

    def _step(self, batch: Callable[[int], list[Group]]) -> None:
        config, progress = self.config, self.progress
        step, lr = progress.step, config.learning_rate(progress.step)
        # Randomness is a function of (seed, step), so that there is no generator to save: not torch's, nor
        # Megatron-core's tracker of CUDA generators, from which nothing is drawn: attention has no dropout.
        torch.manual_seed(config.seed * 1_000_003 + step)
        began = time.perf_counter()
        groups = batch(step)
        self.meter.waited(time.perf_counter() - began)
        limit = _spike(config, progress)
        skip_above = limit if config.skip_spikes else math.inf
        metrics = self.trainer.step(groups, lr, skip_above) if groups else dict(NOTHING)
        progress.step += 1
        progress.tokens += int(metrics.pop("tokens"))
        if metrics["loss"] > limit:
            progress.spikes += 1
            self.log(f"step {progress.step}: loss {metrics['loss']:.4g} is a spike, above {limit:.4g}")
        self._count_skipped(metrics)
        if math.isnan(progress.first_loss):
            progress.first_loss = metrics["loss"]
            self._check_first_loss()
        progress.recent = [*progress.recent, metrics][-max(1, min(RECENT, config.steps // 10)) :]
        self._tell(metrics | {"lr": lr}, self.meter.step(groups))

    def _due(self) -> bool:
        step, every, config = self.progress.step, self.config.save_every, self.config
        last = every and step == config.steps > every
        return bool(last or (every and step % every == 0) or (config.keep_every and step % config.keep_every == 0))

    def _tell(self, metrics: dict[str, float], speed: dict[str, float]) -> None:
        step, steps = self.progress.step, self.config.steps
        if dist.get_rank():
            return
        self.ctx.metrics(step, **metrics, **speed)
        if step % self.config.log_every == 0 or step in (1, steps):
            lr = f"{metrics['lr']:.1e}".replace("e-0", "e-")
            self.log(
                f"step {step}/{steps} loss {metrics['loss']:.4g} lr {lr} norm {metrics['grad_norm']:.3g} "
                f"tokens/s {speed['tokens_per_second']:,.0f} TFLOP/s {speed['tflops_per_gpu']:.3g} "
                f"data {speed['data_wait']:.0%} memory {speed['peak_memory_gib']:.3g} GiB "
                f"eta {self.meter.eta(steps - step):.0f}s"
            )

    def _count_skipped(self, metrics: dict[str, float]) -> None:
        config, progress = self.config, self.progress
        skipped = int(metrics.pop("skipped"))
        progress.skipped += skipped
        progress.streak = progress.streak + 1 if skipped else 0
        if config.spike_factor and not skipped and math.isfinite(metrics["loss"]):
            progress.losses = [*progress.losses, metrics["loss"]][-SPIKE_STEPS:]
        if progress.streak > config.max_skipped:
            raise CuveeError(
                f"max_skipped: the loss or its gradient was NaN, infinite or a spike in {progress.streak} steps in a "
                f"row, {progress.step - progress.streak + 1} to {progress.step} (loss {metrics['loss']}, gradient norm "
                f"{metrics['grad_norm']}); lower lr {config.lr:g} or look at the data of these steps"
            )

    def _check_first_loss(self) -> None:
        expected, found = math.log(self.trainer.sizes.vocab_size), self.progress.first_loss
        if self.fresh and abs(found - expected) > FIRST_LOSS * expected:
            self.log(
                f"warning: the first loss is {found:.4g}, but a new model should guess: about ln(vocab_size) = "
                f"{expected:.4g}; look at init_std, logit_scale and the data"
            )


def _spike(config: TrainConfig, progress: Progress) -> float:
    """The loss above which a step is a spike: spike_factor times the median of the recent ones."""
    if not config.spike_factor or len(progress.losses) < SPIKE_STEPS // 2:
        return math.inf
    median = statistics.median(progress.losses)
    return config.spike_factor * median if median > 0 else math.inf  # a loss below 0 has no such scale


def _closing(progress: Progress) -> dict[str, float]:
    """The first loss; means over the recent steps in which a metric was finite, `loss` first; the run's totals."""
    names = {name for metrics in progress.recent for name in metrics}
    found = {}
    for name in sorted(names, key=lambda name: (name != "loss", name)):
        values = [m[name] for m in progress.recent if math.isfinite(m.get(name, math.nan))]
        if values:
            found[name] = sum(values) / len(values)
    totals = {n: float(getattr(progress, n)) for n in ("tokens", "skipped", "spikes")}
    return {"loss_first": progress.first_loss, **found, "steps": float(progress.step), **totals}


@contextmanager
def _batches(config: TrainConfig, stream: Stream, trainer: Trainer) -> Iterator[Callable[[int], list[Group]]]:
    """The stream's batches by step. Where it is prefetchable, a thread builds the next one while a step runs."""
    if not (config.prefetch and getattr(stream, "prefetchable", False)):
        yield lambda step: stream.batch(step, trainer)
        return
    ahead: dict[int, Future] = {}
    with ThreadPoolExecutor(1, "batches") as thread:

        def batch(step: int) -> list[Group]:
            groups = (ahead.pop(step, None) or thread.submit(stream.batch, step, trainer)).result()
            if step + 1 < config.steps:
                ahead[step + 1] = thread.submit(stream.batch, step + 1, trainer)
            return groups

        yield batch


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


def _anywhere(*flags: bool) -> list[bool]:
    """Whether each flag is set on any rank, so that all do the same after the same step."""
    if dist.get_world_size() == 1:
        return list(flags)
    seen = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    return [bool(flag) for flag in seen.tolist()]
