"""Weights between a Megatron-core model and a Hugging Face folder, one tensor at a time, both ways.

A family's table lists every parameter as a `Row`. Everything here works on rows alone and
is blind to the parallel layout: a rank reads its shard of each row and contributes it back.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from stages.model.config import ModelConfig
from stages.model.families._table import EMBEDDING, OUTPUT, SCORE, Row
from stages.model.folder import full_disk_is_oserror
from stages.stage import CuveeError, resolve

if TYPE_CHECKING:
    from stages.model.model import Model

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


def table(config: ModelConfig, head: str = "lm") -> list[Row]:
    """Every parameter of a model of config's family with its Hugging Face tensors; head "lm" or "reward"."""
    return resolve("model/families", config.family).table(config, head)


class Folder(Mapping):
    """The tensors of a Hugging Face folder by name, each read from disk when asked for, as FP32.

    Raises CuveeError without weights, or where a file is missing or cut short.
    """

    def __init__(self, path: Path):
        file, names = path / INDEX, ["model.safetensors"]
        self._files: dict[str, Any] = {}
        try:
            if file.exists():
                names = sorted(set(json.loads(file.read_text())["weight_map"].values()))
            for file in (path / name for name in names):
                handle = safe_open(file, framework="pt")
                self._files.update(dict.fromkeys(handle.keys(), handle))
        except Exception as error:  # safetensors raises its own type for a damaged header, OSError for no file
            raise CuveeError(f"{file}: no readable weights ({error}); restore the file or its stage") from None

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())


class Initial(Mapping):
    """Initial weights by Hugging Face name: a function of (seed, name) alone, whatever the parallel layout."""

    def __init__(self, rows: Iterable[Row], seed: int):
        self._rows = {name: (shape, row.std) for row in rows for name, shape in row.hf.items()}
        self._seed = seed

    def __getitem__(self, name: str) -> Tensor:
        shape, std = self._rows[name]
        if std is None:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._rows[name][0]


def check(rows: list[Row], source: Folder | Initial, where: str) -> None:
    """Raises CuveeError that lists the missing, extra and wrongly shaped keys of `source`.

    A reward model may start from a language model, which has no `score.weight` and maybe an output layer.
    """
    expected = _shapes(rows)
    spare = {SCORE, "lm_head.weight"} if SCORE in expected else set()
    problems = [f"missing {name}" for name in sorted(expected.keys() - source.keys() - spare)]
    problems += [f"unknown {name}" for name in sorted(source.keys() - expected.keys() - spare)]
    for name in sorted(expected.keys() & source.keys()):
        if source.shape(name) != expected[name]:
            problems.append(f"{name} is {list(source.shape(name))}, expected {list(expected[name])}")
    if problems:
        raise CuveeError(f"{where}: the weights do not fit config.json: {'; '.join(problems)}")


def load(
    model: Model | list[Model],
    rows: list[Row],
    source: Mapping[str, Tensor],
    exact: dict[Parameter, Tensor] | None = None,
) -> None:
    """Copy `source` into this rank's parameters, and tell Megatron-core which of them are split.

    model: a model, or the chunks of one that this rank has. exact: gets the FP32 values of parameters that round them.
    """
    parameters = by_name(model)
    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    # The last pipeline stage's copy of a tied embedding has the output layer's name.
    copies = {} if any(row.name == OUTPUT for row in rows) else {EMBEDDING: OUTPUT}
    for row in rows:
        held = [parameters[name] for name in (row.name, copies.get(row.name)) if name in parameters]
        if not held:
            continue
        whole = row.join([source[name] for name in row.hf])
        shard = whole if row.split is None else whole.chunk(ranks, row.split)[rank]
        for parameter in held:
            with torch.no_grad():
                parameter.copy_(shard.reshape(parameter.shape))
            if exact is not None and parameter.dtype != torch.float32:
                exact[parameter] = shard.clone()  # the whole, of which a share may be a view, is not to be kept
            if row.split is not None and not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, True, min(row.split, 1), 1)


def _as_float(parameter: Parameter) -> Tensor:
    return parameter.detach().float()


def state(
    model: Model | list[Model], rows: list[Row], value: Callable[[Parameter], Tensor] = _as_float
) -> dict[str, Tensor]:
    """A copy of the whole model by Hugging Face names, FP32, on every rank's device; a collective.

    value: a parameter -> its FP32 value on this rank, e.g. the optimizer's main weight.
    """
    parameters, group = by_name(model), parallel_state.get_tensor_model_parallel_group()
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    held = _names(parameters, pipeline)
    found: dict[str, Tensor] = {}
    for row in rows:
        whole = _part(parameters, row, value)
        if whole is not None and row.split is not None and dist.get_world_size(group) > 1:
            parts = [torch.empty_like(whole) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, whole.contiguous(), group=group)
            whole = torch.cat(parts, row.split)
        if len(held) > 1:
            device = next(iter(parameters.values())).device
            whole = torch.empty(row.whole, device=device) if whole is None else whole.contiguous()
            dist.broadcast(whole, group=pipeline, group_src=[row.name in names for names in held].index(True))
        for name, tensor in zip(row.hf, row.divide(whole), strict=True):
            found[name] = tensor.clone()
    return found


def save(
    model: Model | list[Model], rows: list[Row], out: Path, value: Callable[[Parameter], Tensor] = _as_float,
    shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write the model's safetensors to `out` from rank 0 as FP32, files of at most `shard_bytes` (or one tensor); a collective.

    No rank holds more than its share of one row, but for rank 0, in host memory, a whole row beside the file that it fills.
    value: see state.
    """
    source = _to_first(by_name(model), rows, value)
    if dist.get_rank() == 0:
        write(out, _shapes(rows), source, torch.float32, shard_bytes)
    for _ in source:  # the other ranks' part in it
        pass


def _to_first(
    parameters: dict[str, Parameter], rows: list[Row], value: Callable[[Parameter], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor in the table's order, whole, FP32, in host memory of rank 0 alone, to which the others send
    what they hold."""
    group = parallel_state.get_model_parallel_group()
    here, held = dist.get_rank(group), _names(parameters, group)
    for row in rows:
        part = _part(parameters, row, value)
        holders = [rank for rank, names in enumerate(held) if row.name in names]
        holders = holders[: 1 if row.split is None else None]
        if dist.get_global_rank(group, 0) or here not in (0, *holders):
            continue  # another replica of the model, or nothing of this row
        if here:
            dist.send(part.cpu().contiguous(), group=group, group_dst=0)
            continue
        parts = [part.cpu() if holder == 0 else torch.empty(_shape(row)) for holder in holders]
        for holder, received in zip(holders, parts, strict=True):
            if holder:
                dist.recv(received, group=group, group_src=holder)
        whole = torch.cat(parts, row.split) if len(parts) > 1 else parts[0]
        yield from zip(row.hf, row.divide(whole), strict=True)


def _names(parameters: dict[str, Parameter], group: Any) -> list[set[str]]:
    """The parameters that each rank of `group` holds."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, set(parameters), group=group)
    return found


def _part(parameters: dict[str, Parameter], row: Row, value: Callable[[Parameter], Tensor]) -> Tensor | None:
    """This tensor-parallel rank's share of a row; None where another pipeline stage has it."""
    return value(parameters[row.name]).reshape(_shape(row)) if row.name in parameters else None


def _shape(row: Row) -> list[int]:
    """Of one tensor-parallel rank's share of a row."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return [size // ranks if i == row.split else size for i, size in enumerate(row.whole)]


def write(
    out: Path,
    shapes: Mapping[str, tuple[int, ...]],
    source: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the safetensors of `source`, in the order of `shapes`, holding a file (at most `shard_bytes`, or one tensor) at
    a time. The bytes are a function of the weights alone."""
    plan, sizes = {}, [0]
    for name, shape in shapes.items():
        size = dtype.itemsize * math.prod(shape)
        if sizes[-1] and sizes[-1] + size > shard_bytes:
            sizes.append(0)
        sizes[-1] += size
        plan[name] = len(sizes) - 1
    files = [f"model-{i + 1:05d}-of-{len(sizes):05d}.safetensors" for i in range(len(sizes))]
    files = files if len(sizes) > 1 else ["model.safetensors"]
    pending: dict[str, Tensor] = {}
    for name, tensor in source:
        # A copy is contiguous and shares no storage.
        pending[name] = tensor.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        if sum(t.nbytes for t in pending.values()) == sizes[plan[name]]:
            with full_disk_is_oserror(out):
                save_file(pending, out / files[plan[name]], metadata={"format": "pt"})
            pending = {}
    if len(sizes) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": {k: files[v] for k, v in sorted(plan.items())}}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shapes(rows: Iterable[Row]) -> dict[str, tuple[int, ...]]:
    return {name: shape for row in rows for name, shape in row.hf.items()}


def by_name(model: Model | list[Model]) -> dict[str, Parameter]:
    """This rank's parameters by name, with each layer's number counted in the whole model."""
    found = {}
    for chunk in model if isinstance(model, list) else [model]:
        numbers = {str(i): str(layer.layer_number - 1) for i, layer in enumerate(chunk.decoder.layers)}
        for name, parameter in chunk.named_parameters():
            head, _, tail = name.partition("decoder.layers.")
            local, _, rest = tail.partition(".")
            found[f"decoder.layers.{numbers[local]}.{rest}" if not head and tail else name] = parameter
    return found
