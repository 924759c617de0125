"""The stream behind train.rl: rollouts of the policy in training, sampled by all processes, on disk before they are used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from transformers import AutoTokenizer

from stages.rewards._common import refuse_idle
from stages.rollout._collect import Sampler, load_prompts, read_jsonl, render_prompt, schedule, statistics, write_jsonl
from stages.rollout.engines._engine import parity
from stages.stage import Context, CuveeError, resolve
from stages.train._groups import epoch_slice, grouper_of
from stages.trainer.batch import Sequence
from stages.trainer.parallel import gathered, on_first

PROBES = 4  # prompts of a block whose log-probabilities check that engine and trainer agree after each sync


class Rollouts:
    """A Stream of groups sampled by the policy in training.

    A block's rollouts are a function of the configuration and of the weights at one step, and lie in the scratch folder
    before a checkpoint of that step or a later one can: whatever a run resumes from finds the very same ones, and there
    is no buffer, generator or engine to save. Off-policy a server (whose samples no seed repeats exactly) writes the next
    block during the training of this one; a run that was killed meanwhile samples it on-policy.
    """

    def __init__(self, config: Any, inputs: dict[str, Any], ctx: Context, module: Any):
        self.config, self.ctx, self.init = config, ctx, inputs["init"].path
        self.folder = ctx.scratch / "rollouts"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.reward = inputs["reward"].path if "reward" in inputs else None
        self.engines = resolve("rollout/engines", config.engine)
        self.tokenizer = AutoTokenizer.from_pretrained(self.init)
        self.prompts = self._fitting(load_prompts(inputs["prompts"], config.mix))
        refuse_idle(config.verified_by(), [p for rows in self.prompts.values() for p in rows])
        draws = len(self.files()) * config.prompts_of_block()
        self.drawn = schedule({d: len(rows) for d, rows in self.prompts.items()}, config.mix, draws, config.seed)
        behaviour = module.NEEDS_BEHAVIOUR or (config.temperature == 1 and not config.with_answer)
        self.grouper = grouper_of(config, module, self.tokenizer, behaviour=behaviour)
        self.sampler: Sampler | None = None
        self.current, self.groups, self.version = -1, [], 0
        self.clock = Clock()
        self._thread = ThreadPoolExecutor(1, "rollouts")
        self.ahead: tuple[int, int, float, Future | None] | None = None  # arguments of _keep, and what it waits for

    def files(self) -> list[Path]:
        return [self._file(i) for i in range(self.config.block(self.config.steps - 1)[0] + 1)]

    def batch(self, step: int, trainer: Any) -> list:
        number, first = self.config.block(step)
        if number != self.current:
            self._make(number, first, trainer)
            self._load(number, first)
        self._tell(step, {"rollout/staleness": step - self.version})  # optimizer steps behind the weights in training
        if not self.groups:
            return []
        count = min(self.config.batch_groups, len(self.groups))  # of few groups none is taken twice, but where an epoch ends
        order = epoch_slice(len(self.groups), (step - first) * count, count, self.config.seed + first)
        return [group for i in order for group in self.groups[i]]

    def _load(self, number: int, first: int) -> None:
        """The groups of each prompt of the block (none if its rewards do not tell completions apart)."""
        rows = read_jsonl(self._file(number))
        self.groups = [found for found in map(self.grouper, rows) if found]
        self.current, self.version = number, rows[0]["version"]
        if not self.groups:
            self.ctx.log(
                f"step {first}: none of {len(rows)} prompts tells its completions apart; nothing to learn from"
            )

    def _make(self, number: int, step: int, trainer: Any) -> None:
        """Sample with the weights of now what there is not yet of a block and, off-policy, of the one after it."""
        self._await()
        last = min(number + self.config.off_policy, len(self.files()) - 1)
        missing = [i for i in range(number, last + 1) if not on_first(self._file(i).exists)]
        if not missing:
            return
        first = self.clock.last is None
        if not first:
            self._tell(step, self.clock.lap())
        gap = self._sync(number, trainer)
        if first:
            self.clock.lap()  # starts it: to make the engine, once a process, is no part of a step
        for block in missing:
            if self.engines.REMOTE and block > number:  # while this block is trained on
                asks = dist.get_rank() == 0
                self.ahead = (block, step, gap, self._thread.submit(self._ask, block) if asks else None)
                continue
            for name, seconds in self._keep(block, step, gap, partial(self._ask, block)).items():
                self.clock.spent[name] += seconds

    def _sync(self, number: int, trainer: Any) -> float:
        """Bring the policy's weights to the engine and probe that both give the same log-probabilities (nats)."""
        with self.clock.measure("syncing"):
            probes = [render_prompt(self.tokenizer, p) for p in self._prompts_of(number)[:PROBES]]
            groups = [[Sequence(np.array(p, np.int32), np.ones(len(p), np.float32))] for p in probes]
            weights, logprobs = self._weights(trainer), trainer.logprobs(groups)
            return max(self._everywhere(lambda: self._take_over(weights, probes, logprobs)))

    def _weights(self, trainer: Any) -> Any:
        """The policy's weights by their names, or for a server a folder of them: no process then holds them all at once."""
        if not self.engines.REMOTE:
            return trainer.hf_state()
        folder = self.ctx.scratch / "engine"
        on_first(lambda: self.engines.prepare(self.init, folder))
        trainer.save_weights(folder)
        dist.barrier()
        return folder

    def _take_over(self, weights: Any, probes: list[list[int]], logprobs: list[np.ndarray]) -> float:
        if self.sampler is None:
            engine = self.config.make_engine(self.init, self.ctx, weights)
            self.sampler = Sampler(self.config, engine, self.ctx, self.reward)
        else:
            self.sampler.engine.sync_weights(weights)
        return parity(self.sampler.engine, probes, logprobs, weights)

    def _ask(self, number: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """(rows, seconds spent) of this process's share of a block's prompts."""
        prompts, before = self._prompts_of(number), dict(self.sampler.seconds)
        ranks = 1 if self.engines.REMOTE else dist.get_world_size()
        first, end = (len(prompts) * (dist.get_rank() + i) // ranks for i in (0, 1))
        seed = self.config.seed * 1_000_003 + number * self.config.rollout_every
        rows = self.sampler(prompts[first:end], seed, (first, len(prompts))) if first < end else []
        return rows, {name: seconds - before[name] for name, seconds in self.sampler.seconds.items()}

    def _keep(self, number: int, version: int, gap: float, ask: Callable[[], Any]) -> dict[str, float]:
        """Write the block's rollouts, sampled by the policy of step `version`; the seconds that the slowest needed."""
        parts = self._everywhere(ask)
        rows = [{"version": version, **row} for rows, _ in parts for row in rows]
        on_first(lambda: write_jsonl(self._file(number), rows))
        spent = {name: max(seconds[name] for _, seconds in parts) for name in parts[0][1]}
        found = statistics(rows, self.config.completions)
        tokens = sum(len(t) for row in rows for t in row["tokens"][: self.config.completions])
        step, speed = number * self.config.rollout_every, tokens / max(spent["generating"], 1e-9)
        values = {f"rollout/{name}": value for name, value in found.items()}
        self._tell(step, {**values, "rollout/parity": gap, "rollout/tokens_per_second": speed})
        if dist.get_rank() == 0:
            self.ctx.log(f"step {step}: {tokens} tokens of {len(rows)} prompts in {spent['generating']:.1f} s, "
                         f"reward {found['reward']:.3f}")  # fmt: skip
        return spent

    def _await(self) -> None:
        """Keep the block that a server has written while the one before was trained on, if there is one."""
        if self.ahead is not None:
            with self.clock.measure("generating"):
                (*block, future), self.ahead = self.ahead, None
                self._keep(*block, future and future.result)

    def _everywhere(self, make: Callable[[], Any]) -> list[Any]:
        """What `make` gives on each process that samples (the first alone where the engine is a server), on all of them."""
        return gathered(make, only_first=self.engines.REMOTE)

    def _tell(self, step: int, values: dict[str, float]) -> None:
        if dist.get_rank() == 0:
            self.ctx.metrics(step, **values)

    def _prompts_of(self, number: int) -> list[dict]:
        count = self.config.prompts_of_block()
        return [self.prompts[domain][i] for domain, i in self.drawn[number * count :][:count]]

    def _fitting(self, prompts: dict[str, list[dict]]) -> dict[str, list[dict]]:
        longest = self.config.sequence_length - self.config.max_new_tokens
        fits = lambda p: len(render_prompt(self.tokenizer, p)) <= longest  # noqa: E731
        found = {domain: [p for p in rows if fits(p)] for domain, rows in prompts.items()}
        for domain, rows in found.items():
            if not rows:
                raise CuveeError(
                    f"sequence_length: no prompt of {domain} is within {longest} tokens (sequence_length - "
                    f"max_new_tokens); raise it or leave the domain out of mix"
                )
            if len(rows) < len(prompts[domain]):
                self.ctx.log(
                    f"{domain}: {len(prompts[domain]) - len(rows)} prompts are longer than {longest} tokens; left out"
                )
        return found

    def _file(self, number: int) -> Path:
        return self.folder / f"block-{number:06d}.jsonl"


class Clock:
    """Where the time of this process goes: shares of what is measured, and of training, which is all the rest."""

    def __init__(self) -> None:
        self.spent = {"syncing": 0.0, "generating": 0.0, "rewarding": 0.0}  # seconds
        self.began = self.last = None

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.spent[name] += time.monotonic() - began

    def lap(self) -> dict[str, float]:
        """Shares since the last lap; none at the first, which starts the clock."""
        found = self._shares(*self.last) if self.last else {}
        self.last = (time.monotonic(), dict(self.spent))
        self.began = self.began or self.last
        return found

    def total(self) -> dict[str, float]:
        return self._shares(*self.began) if self.began else {}

    def _shares(self, since: float, spent: dict[str, float]) -> dict[str, float]:
        seconds = max(time.monotonic() - since, 1e-9)
        found = {f"share/{name}": (value - spent[name]) / seconds for name, value in self.spent.items()}
        return found | {"share/training": 1 - sum(found.values())}
