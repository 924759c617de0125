"""Blend checkpoints of one parent into one: the experts' soup. One tensor at a time, in FP32."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.stage import ConfigError, Context, Estimate, Input, Kind, option, parse, resolve, unknown

VERSION = "2"
INPUTS = {
    "models": Input(Kind.CHECKPOINT, many=True),
    "base": Input(Kind.CHECKPOINT, optional=True),
    "scores": Input(Kind.SCORES, many=True, optional=True),
}
OUTPUT = Kind.CHECKPOINT
METHODS = "merge/methods"


@dataclass
class Config:
    method: str = option("linear", "how the tensors are combined", METHODS)
    weights: dict[str, float] = option({}, "weight of each model by its input name; a model left out weighs 1")
    options: dict[str, float] = option({}, "the method's own fields, e.g. {density: 0.3} for ties")
    top: int = option(0, "with input `scores`: how many of the models are merged, those that score best; 0 = all")
    seed: int = option(0, "seed of methods that draw")


def check(config: Config, inputs: dict[str, Any]) -> None:
    """Raises ConfigError for weights or options that the method or the inputs do not know."""
    method, models = resolve(METHODS, config.method), list(inputs["models"])
    if config.top and set(inputs.get("scores", {})) != set(models):
        raise ConfigError(f"top: {config.top} chooses by scores; give the input `scores` for each of {', '.join(models)}")
    if not 0 <= config.top <= len(models):
        raise ConfigError(f"top: {config.top} of {len(models)} models; give 0 for all, or 1 to {len(models)}")
    for name in config.weights:
        if name not in models:
            raise ConfigError(f"weights: {unknown(name, models)}")
    (least, most), count = method.MODELS, config.top or len(models)
    if not least <= count <= (most or count):
        wanted = f"exactly {least}" if least == most else f"at least {least}"
        found = f"top {count} of {len(models)}" if config.top else len(models)
        raise ConfigError(f"method: {config.method} merges {wanted} models, found {found} ({', '.join(models)})")
    if method.NEEDS_BASE and "base" not in inputs:
        raise ConfigError(f"method: {config.method} merges changes from a base; give the input `base`, or use linear")
    if config.weights and not method.WEIGHTED:
        raise ConfigError(f"weights: {config.method} finds its own weights; leave them out")
    if method.WEIGHTED and abs(sum(_weights(config, models).values())) < 1e-9:
        raise ConfigError("weights: they sum to 0; give at least one model a weight above 0")
    if config.top and any(not weight > 0 for weight in config.weights.values()):
        raise ConfigError(f"weights: top {config.top} may choose any of {config.weights}; give each a weight above 0")
    _options(config, method)


def _options(config: Config, method: Any) -> Any:
    try:
        return parse(method.Config, config.options, "options")
    except ValueError as error:
        raise ConfigError(f"options: {error}") from None


def _weights(config: Config, models: list[str]) -> dict[str, float]:
    return {name: float(config.weights.get(name, 1.0)) for name in models}


def estimate(config: Config, inputs: dict[str, Any]) -> Estimate:
    return Estimate(parameters=next(iter(inputs["models"].values())).parameters)


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Merge inputs["models"] (and inputs["base"]) into the checkpoint folder `out`.

    Returns the lengths of the task vectors relative to the base, their pairwise cosines, and the soup's own.
    Raises CuveeError for models of different architectures or tokenizers.
    """
    from safetensors.torch import save_file

    from stages.merge.checkpoint import Checkpoint, copy_model, require_same

    check(config, inputs)
    names = sorted(inputs["models"])  # a fixed order of sums: the recipe's order of experts is no part of the address
    if config.top:
        names = best(inputs["scores"], config.top)
        ctx.log(f"the best {config.top} of {', '.join(sorted(inputs['models']))}: {', '.join(names)}")
    models = {name: Checkpoint(inputs["models"][name].path) for name in names}
    base = Checkpoint(inputs["base"].path) if "base" in inputs else None
    require_same(models | ({"base": base} if base else {}))
    first = models[names[0]]
    copy_model(first.path, out, weights=False)
    geometry = Geometry(names)
    for file in dict.fromkeys(first.layout.values()):  # one shard in memory at a time
        keys = [key for key, holder in first.layout.items() if holder == file]
        merged = dict(_merge(config, keys, models, base, geometry))
        save_file(merged, out / file, metadata={"format": "pt"})
        ctx.log(f"{config.method}: {len(merged)} tensors of {len(names)} models -> {file}")
    return {"models": len(names), "parameters": geometry.parameters, **geometry.metrics()}


def best(scores: dict[str, Any], count: int) -> list[str]:
    """Names of the `count` models with the highest mean score over their domains, in alphabetical order."""
    means = {name: one.record["metrics"]["score"] for name, one in scores.items()}
    return sorted(sorted(means, key=lambda name: (-means[name], name))[:count])


def _merge(config: Config, keys: list[str], models: dict, base: Any, geometry: "Geometry") -> Iterator[tuple[str, Any]]:
    method = resolve(METHODS, config.method)
    options, weights = _options(config, method), list(_weights(config, list(models)).values())
    for key in keys:
        # A tied output embedding stored twice is merged once: both names get the input embedding's result.
        tied = next(iter(models.values())).tied and key == "lm_head.weight"
        source = "model.embed_tokens.weight" if tied else key
        stored = [model.tensor(source) for model in models.values()]
        tensors = [tensor.float() for tensor in stored]
        origin = base.tensor(source).float() if base else None
        seed = int.from_bytes(hashlib.sha256(json.dumps([config.seed, source]).encode()).digest()[:7], "little")
        merged = method.merge(tensors, weights, origin, options, seed)
        if not tied:
            geometry.add(tensors, merged, origin)
        yield key, merged.to(stored[0].dtype).contiguous()


class Geometry:
    """Sums of inner products of task vectors theta_i - theta_0 over all tensors; the merged model counts as one."""

    def __init__(self, names: list[str]) -> None:
        self.names = [*names, "soup"]
        self.products: dict[tuple[str, str], float] = {}
        self.base = 0.0
        self.parameters = 0

    def add(self, tensors: list, merged: Any, base: Any) -> None:
        from stages.merge._math import dot

        self.parameters += merged.numel()
        if base is None:
            return
        self.base += dot(base, base)
        deltas = {name: tensor - base for name, tensor in zip(self.names, [*tensors, merged], strict=True)}
        for i, a in enumerate(self.names):
            for b in self.names[i:]:
                self.products[a, b] = self.products.get((a, b), 0.0) + dot(deltas[a], deltas[b])

    def metrics(self) -> dict[str, float]:
        """`change/<name>`: |delta| / |theta_0|; `cosine/<a>/<b>`: of two experts' deltas. Empty without base."""
        found = {}
        for (a, b), product in self.products.items():
            if a == b:
                found[f"change/{a}"] = (product / self.base) ** 0.5 if self.base else 0.0
            elif b != "soup":
                norms = (self.products[a, a] * self.products[b, b]) ** 0.5
                found[f"cosine/{a}/{b}"] = product / norms if norms > 0 else 0.0
        return found
