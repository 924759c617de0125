"""Weights between a Megatron-core model and a Hugging Face folder, one tensor at a time, both ways.

An architecture's table (`cohere2.table`) lists every parameter as a `Row`. Everything here works on rows alone and
is blind to the parallel layout: a rank reads its shard of each row and contributes it back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stages.model.folder import full_disk_is_oserror
from stages.stage import CuveeError

if TYPE_CHECKING:
    from stages.model.model import Model

SHARD_BYTES = 5 * 10**9
TIED = "output_layer.weight"  # the last pipeline stage's copy of the embedding


@dataclass(frozen=True)
class Row:
    """One Megatron-core parameter and the Hugging Face tensors it is made of.

    name: Megatron-core's name with the layer's number in the whole model. hf: names and shapes.
    join: the Hugging Face tensors -> the whole parameter, in a shape whose dimension `split` is divided evenly among
    tensor-parallel ranks (None: each rank has all of it). divide: the inverse. std: of initial weights (None: ones).
    """

    name: str
    hf: dict[str, tuple[int, ...]]
    std: float | None
    split: int | None = None
    join: Callable[[list[Tensor]], Tensor] = lambda tensors: tensors[0]
    divide: Callable[[Tensor], list[Tensor]] = lambda whole: [whole]
    shape: tuple[int, ...] = ()  # of `join`'s result, where it differs from the first Hugging Face tensor's

    @property
    def whole(self) -> tuple[int, ...]:
        return self.shape or next(iter(self.hf.values()))


class Folder(Mapping):
    """The tensors of a Hugging Face folder by name, each read from disk when asked for, as FP32.

    Raises CuveeError without weights, or where a file is missing or cut short.
    """

    def __init__(self, path: Path):
        index, single = path / "model.safetensors.index.json", path / "model.safetensors"
        if index.exists():
            files = sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
        else:
            files = [single]
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except Exception as error:  # safetensors raises its own type for a damaged header, OSError for no file
                raise CuveeError(f"{file}: no readable weights ({error}); restore the file or its stage") from None
            self._files.update(dict.fromkeys(handle.keys(), handle))

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
    """Raises CuveeError that lists the missing, extra and wrongly shaped keys of `source`."""
    expected = {name: shape for row in rows for name, shape in row.hf.items()}
    problems = [f"missing {name}" for name in sorted(expected.keys() - source.keys())]
    problems += [f"unknown {name}" for name in sorted(source.keys() - expected.keys())]
    for name in sorted(expected.keys() & source.keys()):
        if source.shape(name) != expected[name]:
            problems.append(f"{name} is {list(source.shape(name))}, expected {list(expected[name])}")
    if problems:
        raise CuveeError(f"{where}: the weights do not fit config.json: {'; '.join(problems)}")


def load(model: Model, rows: list[Row], source: Mapping[str, Tensor]) -> None:
    """Copy `source` into this rank's parameters, and tell Megatron-core which of them are split."""
    parameters = _parameters(model)
    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    for row in rows:
        held = [parameters[name] for name in _held_as(row) if name in parameters]
        if not held:
            continue
        whole = row.join([source[name] for name in row.hf])
        shard = whole if row.split is None else whole.chunk(ranks, row.split)[rank]
        for parameter in held:
            with torch.no_grad():
                parameter.copy_(shard.reshape(parameter.shape))
            if row.split is not None and not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, True, min(row.split, 1), 1)


def tensors(model: Model, rows: list[Row]) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor of the model in the table's order, whole, FP32, on every rank; a collective."""
    parameters = _parameters(model)
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    for row in rows:
        parameter = parameters.get(row.name)
        whole = None
        if parameter is not None:
            shape = list(row.whole)
            if row.split is not None:
                shape[row.split] //= ranks
            whole = parameter.detach().float().reshape(shape)
            if row.split is not None and ranks > 1:
                parts = [torch.empty_like(whole) for _ in range(ranks)]
                dist.all_gather(parts, whole.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
                whole = torch.cat(parts, row.split)
        yield from zip(row.hf, row.divide(_from_owner(whole, row)), strict=True)


def state(model: Model, rows: list[Row]) -> dict[str, Tensor]:
    """A copy of the whole model by Hugging Face names."""
    return {name: tensor.clone() for name, tensor in tensors(model, rows)}


def save(model: Model, rows: list[Row], out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model's safetensors to `out` from rank 0, holding at most `shard_bytes` at a time; a collective.

    The bytes are a function of the weights alone.
    """
    plan, sizes = {}, [0]
    for row in rows:
        for name, shape in row.hf.items():
            size = 4 * int(torch.Size(shape).numel())
            if sizes[-1] and sizes[-1] + size > shard_bytes:
                sizes.append(0)
            sizes[-1] += size
            plan[name] = len(sizes) - 1
    files = [f"model-{i + 1:05d}-of-{len(sizes):05d}.safetensors" for i in range(len(sizes))]
    files = files if len(sizes) > 1 else ["model.safetensors"]
    writer = dist.get_rank() == 0
    pending: dict[str, Tensor] = {}
    for name, tensor in tensors(model, rows):
        if writer:
            pending[name] = tensor.cpu().clone()  # a clone is contiguous and shares no storage
            if sum(4 * t.numel() for t in pending.values()) == sizes[plan[name]]:
                with full_disk_is_oserror(out):
                    save_file(pending, out / files[plan[name]], metadata={"format": "pt"})
                pending = {}
    if writer and len(sizes) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": {k: files[v] for k, v in sorted(plan.items())}}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _parameters(model: Model) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by name, with each layer's number counted in the whole model."""
    numbers = {str(i): str(layer.layer_number - 1) for i, layer in enumerate(model.decoder.layers)}
    found = {}
    for name, parameter in model.named_parameters():
        head, _, tail = name.partition("decoder.layers.")
        local, _, rest = tail.partition(".")
        found[f"decoder.layers.{numbers[local]}.{rest}" if not head and tail else name] = parameter
    return found


def _held_as(row: Row) -> tuple[str, ...]:
    return (row.name, TIED) if row.name == "embedding.word_embeddings.weight" else (row.name,)


def _from_owner(whole: Tensor | None, row: Row) -> Tensor:
    """`whole` on every pipeline rank, from the first one that has it."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return whole
    group = parallel_state.get_pipeline_model_parallel_group()
    has = torch.zeros(dist.get_world_size(group))
    has[dist.get_rank(group)] = whole is not None
    dist.all_reduce(has, group=group)
    owner = dist.get_global_rank(group, int(has.argmax()))
    whole = torch.empty(row.whole) if whole is None else whole.contiguous()
    dist.broadcast(whole, owner, group=group)
    return whole
