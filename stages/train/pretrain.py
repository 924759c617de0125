"""Pretraining, and the cooldown that extends the context: cross-entropy on packed documents, masked from each other.

The cooldown is the same stage with `init`, a linear schedule and `phases` of growing sequence length, with long
documents every few steps (Command A report, section 2: 8k for 30,000 steps, then 32k, 128k, 256k for 10,000, 5,000 and
5,000; every 4th step, domain-balanced; learning rate from 2.5e-4 linearly to 1e-6 over all of them). A document longer
than the phase's sequence_length is cut evenly, shorter ones are packed, masked from each other. Where a phase needs
another layout (context parallel, recompute, micro-batch), `phase_placement` gives it: the run saves, ends with the
"start me again" status and goes on in the new layout, which its checkpoints do not depend on.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from stages.model.config import ModelConfig
from stages.stage import ConfigError, Context, CuveeError, Estimate, Input, Kind, option, parse, placement, unknown
from stages.trainer.config import TrainConfig

VERSION = "1"
INPUTS = {"tokens": Input(Kind.TOKENS), "init": Input(Kind.CHECKPOINT, optional=True)}
OUTPUT = Kind.CHECKPOINT
DISTRIBUTED = True


@dataclass
class Config(TrainConfig):
    model: ModelConfig = option(ModelConfig, "sizes of a new model; those of input `init`, where given, stand")
    batch_tokens: int = option(4_000_000, "tokens an optimizer step")
    blend: dict[str, float] = option({}, "share of each domain's tokens; empty takes domains by their size")
    max_epochs: float = option(4.0, "most passes over any domain; more is refused (Muennighoff et al. 2023)")
    phases: list[list[int]] = option(
        [], "[[sequence_length, steps], ...] in turn, e.g. of a context extension; empty = one of sequence_length"
    )
    long_every: int = option(0, "every n-th step takes only documents longer than half a sequence; 0 = never")
    phase_placement: list[dict[str, Any]] = placement(
        [], "placement fields of each phase, e.g. [{}, {context_parallel: 8, recompute: full}]; empty = all alike"
    )

    def plan(self) -> list[tuple[int, int]]:
        """(sequence_length, steps) of each phase."""
        return [(length, steps) for length, steps in self.phases] or [(self.sequence_length, self.steps)]

    def phase(self, step: int) -> tuple[int, int]:
        """(phase, step within it) of step `step`, both from 0."""
        for number, (_, steps) in enumerate(self.plan()):
            if step < steps:
                return number, step
            step -= steps
        raise IndexError(step)

    def placed(self, step: int) -> "Config":
        return replace(self, **self.phase_placement[self.phase(step)[0]]) if self.phase_placement else self


def check(config: Config, inputs: dict[str, Any]) -> None:
    config.check()
    if any(len(phase) != 2 or min(phase) < 1 for phase in config.phases):
        raise ConfigError(f"phases: {config.phases} should be a list of [sequence_length, steps], both at least 1")
    longest, total = max(length for length, _ in config.plan()), sum(steps for _, steps in config.plan())
    if total != config.steps:
        raise ConfigError(f"steps: {config.steps}, but phases {config.phases} have {total}; make them agree")
    _check_placement(config)
    if config.batch_tokens < longest:
        raise ConfigError(f"batch_tokens: {config.batch_tokens} is less than one sequence of {longest}; raise it")
    if any(not share >= 0 for share in config.blend.values()) or (config.blend and not any(config.blend.values())):
        raise ConfigError(f"blend: {config.blend} needs shares of 0 or more, one of them positive")
    if config.long_every < 0:
        raise ConfigError(f"long_every: {config.long_every} is negative; give 0 or more")
    if not config.max_epochs > 0:
        raise ConfigError(f"max_epochs: {config.max_epochs} passes over nothing; give more than 0")
    if "init" in inputs:
        if config.model != ModelConfig():
            raise ConfigError("model: the sizes come from the checkpoint that training starts from; leave model out")
        return
    config.model.check()
    if longest > config.model.max_position_embeddings:
        raise ConfigError(
            f"model.max_position_embeddings: {config.model.max_position_embeddings} is shorter than a sequence of "
            f"{longest}; raise it or shorten sequence_length"
        )


def _check_placement(config: Config) -> None:
    if config.phase_placement and len(config.phase_placement) != len(config.plan()):
        raise ConfigError(
            f"phase_placement: {len(config.phase_placement)} entries for {len(config.plan())} phases; give one each"
        )
    places = {field.name for field in fields(Config) if field.metadata.get("placement")}
    # One kind of optimizer can't go on from the checkpoint of another.
    fixed = {"phase_placement", "distributed_optimizer", "fsdp"}
    if config.fsdp:  # whose checkpoints are of one model-parallel layout
        fixed |= {"tensor_parallel", "pipeline_parallel", "virtual_pipeline"}
    allowed = sorted(places - fixed)
    for i, values in enumerate(config.phase_placement):
        for name in values:
            if name not in allowed:
                raise ConfigError(f"phase_placement[{i}]: {unknown(name, allowed)}")
        parsed = parse(Config, values, f"phase_placement[{i}]")
        values.update({name: getattr(parsed, name) for name in values})
        replace(config, **values).check(f"phase_placement[{i}]")


def estimate(config: Config, inputs: dict[str, Any]) -> Estimate:
    parameters = inputs["init"].parameters if "init" in inputs else config.model.parameters()
    return Estimate(parameters=parameters, train_tokens=config.steps * config.batch_tokens)


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Train and write the CHECKPOINT folder; the trainer's metrics and `epochs_<domain>`.

    Raises CuveeError for a domain of `blend` that the tokens lack, more epochs than `max_epochs`, or a vocabulary
    larger than the model's.
    """
    from functools import partial

    from stages.model.folder import read_config
    from stages.objectives import ce
    from stages.train._documents import Documents
    from stages.trainer.loop import train

    tokens: Path = inputs["tokens"].path
    init = inputs["init"].path if "init" in inputs else None
    model = read_config(init) if init else config.model
    longest = max(length for length, _ in config.plan())
    model = replace(model, max_position_embeddings=max(model.max_position_embeddings, longest))
    stream = Documents(config, tokens, inputs["tokens"].fingerprint)
    for domain, epochs in stream.epochs.items():
        ctx.log(f"{domain}: {stream.drawn[domain]:,.0f} tokens, {epochs:.2f} epochs")
    metrics = train(
        config=config, stream=stream, objective=partial(ce.loss, config=ce.Config()), out=out, ctx=ctx,
        model=model, init=init, tokenizer=tokens / "tokenizer",
    )  # fmt: skip
    return metrics | {f"epochs_{domain}": epochs for domain, epochs in stream.epochs.items()}


def shares(blend: dict[str, float], sizes: dict[str, int]) -> dict[str, float]:
    """Share of each domain's tokens, adding up to 1: `blend` normalised, or in proportion to `sizes`.

    Raises CuveeError for a domain without tokens.
    """
    for domain in blend:
        if blend[domain] and not sizes.get(domain):
            raise CuveeError(f"blend: domain {unknown(domain, sorted(d for d in sizes if sizes[d]))}")
    weights = blend or {domain: float(size) for domain, size in sizes.items()}
    total = sum(weights.values())
    return {domain: weight / total for domain, weight in sorted(weights.items()) if weight}
