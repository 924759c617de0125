"""What a stage is: a typed configuration, kinds of artifact in and out, and the context it runs in.

A stage is one module, `stages/<area>/<name>.py`, called "<area>.<name>". It defines

    VERSION: str        raised when the same configuration and inputs would give other bytes
    INPUTS: dict        argument name -> Input(kind), see `Input`
    OUTPUT: Kind        the kind of artifact it makes
    Config: dataclass   fields made with `option` or `placement`
    run(config, inputs, out, ctx) -> dict[str, float]
                        reads `inputs`, writes only under `out`, returns its closing metrics, the most telling
                        first: four of them are shown when it is done

and may define

    external(config) -> dict            the identity of what it reads from outside the store (sources)
    check(config, inputs) -> None       raises ConfigError for a combination no type can refuse
    estimate(config, inputs) -> Estimate  the work ahead, from configurations alone
    DISTRIBUTED = True                  one process a device runs it (every stage that trains), not one in all

Importing the module imports neither torch nor Prefect, so that a whole recipe is checked in about a second;
`run` imports what it needs.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent


class Kind(StrEnum):
    CORPUS = "corpus"
    TOKENIZER = "tokenizer"
    TOKENS = "tokens"
    PROMPTS = "prompts"
    CONVERSATIONS = "conversations"
    PAIRS = "pairs"
    CHECKPOINT = "checkpoint"
    REWARD_MODEL = "reward_model"
    SCORES = "scores"
    VERDICTS = "verdicts"
    EXPORT = "export"
    REPORT = "report"


@dataclass(frozen=True)
class Input:
    """An argument of a stage: `many` takes a dictionary of artifacts, `optional` may be left out."""

    kind: Kind
    many: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Artifact:
    """A published artifact on this machine's disk: `path` holds its files, `record` how it was made."""

    path: Path
    kind: Kind
    fingerprint: str
    record: dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """The work of one stage: parameters of the model it leaves, tokens it trains on, tokens it generates, and at most so
    many requests to teachers."""

    parameters: int = 0
    train_tokens: int = 0
    generated_tokens: int = 0
    requests: int = 0


class CuveeError(Exception):
    """A mistake or a state that the user can mend; printed as one sentence, without a traceback."""


class ConfigError(CuveeError):
    """A configuration that no run could honour. Names the field, what was found, what is allowed."""


def option(default: Any, help: str, choices: str | tuple[str, ...] | None = None) -> Any:
    """A field that decides the artifact's bytes. `choices`: names, or a folder under stages/ whose files are names."""
    return _field(default, {"help": help, "choices": choices})


def placement(default: Any, help: str, choices: str | tuple[str, ...] | None = None) -> Any:
    """A field that only says where or how fast (micro-batch, threads, paths): never part of a fingerprint."""
    return _field(default, {"help": help, "choices": choices, "placement": True})


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def names(folder: str) -> list[str]:
    """The registry: every public file of `stages/<folder>` is a name. Raises ConfigError without that folder."""
    path = ROOT / folder
    if not path.is_dir():
        raise ConfigError(f"stages/{folder} does not exist; it should hold one file a choice")
    return sorted(p.stem for p in path.glob("*.py") if not p.stem.startswith("_"))


def resolve(folder: str, name: str) -> ModuleType:
    """The module behind a registered name, e.g. resolve("objectives", "copg"). Raises ConfigError if there is none."""
    if name not in names(folder):
        raise ConfigError(f"{folder}: {unknown(name, names(folder))}")
    return importlib.import_module(f"stages.{folder.replace('/', '.')}.{name}")


def load(name: str) -> ModuleType:
    """The stage called "<area>.<name>". Raises ConfigError if there is none."""
    area, _, leaf = name.rpartition(".")
    module = resolve(area.replace(".", "/"), leaf)
    if not hasattr(module, "OUTPUT"):
        raise ConfigError(f"stages/{area}/{leaf}.py is no stage: it defines no OUTPUT")
    return module


def unknown(found: str, allowed: list[str]) -> str:
    """The end of an error sentence: what was found, the nearest valid name, and what is allowed."""
    near = difflib.get_close_matches(found, allowed, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{found!r} is not known; {hint}allowed: {', '.join(map(str, allowed))}"


def parse(config_type: type, values: dict[str, Any], where: str) -> Any:
    """An instance of `config_type` from plain values or from a composed section, with every key and type checked.

    Raises ConfigError naming `where.key`, what was given and what is allowed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    typed = OmegaConf.get_type(values) is config_type  # a composed section, whose values are of their types already
    if typed:
        _check_keys(values, where)
    try:
        config = OmegaConf.to_object(values if typed else OmegaConf.merge(OmegaConf.structured(config_type), values))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, config_type, where)) from None
    _check_finite(config, where)
    _check_choices(config, where)
    return config


def _check_finite(value: Any, where: str) -> None:
    """No address can be made of nan or infinity, which JSON does not have, and no comparison refuses nan."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {value} is not a finite number")
    if dataclasses.is_dataclass(value):
        value = vars(value)
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _check_finite(one, f"{where}.{key}" if isinstance(value, dict) else f"{where}[{key}]")


def _check_keys(section: Any, where: str) -> None:
    """Hydra's + adds keys to a section that its type does not have."""
    from omegaconf import OmegaConf

    fields = [f.name for f in dataclasses.fields(OmegaConf.get_type(section))]
    for key in section:
        if key not in fields:
            raise ConfigError(f"{where}.{key}: {unknown(key, fields)}")
        child = section._get_node(key)
        if dataclasses.is_dataclass(OmegaConf.get_type(child)):
            _check_keys(child, f"{where}.{key}")


def _explain(error: Exception, config_type: type, where: str) -> str:
    key = str(getattr(error, "full_key", "") or getattr(error, "key", "") or "").removeprefix(f"{where}.")
    holder: Any = config_type
    *parents, leaf = key.split(".")
    for part in parents:
        known = {f.name: f for f in dataclasses.fields(holder)} if dataclasses.is_dataclass(holder) else {}
        holder = known[part].default_factory if part in known else None  # None: inside a dictionary
    fields = [f.name for f in dataclasses.fields(holder)] if dataclasses.is_dataclass(holder) else []
    if fields and leaf not in fields:
        return f"{where}.{key}: {unknown(leaf, fields)}"
    reason = str(error.__cause__ or error).splitlines()[0]
    return f"{where}.{key}: {reason}"


def _check_choices(config: Any, where: str) -> None:
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata.get("choices")
        if dataclasses.is_dataclass(value):
            _check_choices(value, f"{where}.{field.name}")
        elif choices:
            allowed = names(choices) if isinstance(choices, str) else list(choices)
            for item in value if isinstance(value, list) else [value]:
                if item not in allowed:
                    raise ConfigError(f"{where}.{field.name}: {unknown(str(item), allowed)}")


def identity(config: Any) -> dict[str, Any]:
    """The configuration as plain values, without the fields that only say where or how fast."""
    found = {}
    for field in dataclasses.fields(config):
        if not field.metadata.get("placement"):
            value = getattr(config, field.name)
            found[field.name] = identity(value) if dataclasses.is_dataclass(value) else value
    return found


@dataclass
class Context:
    """What a running stage gets besides its inputs. Nothing here may change the bytes it writes.

    scratch: a folder that survives a crash of this stage (checkpoints to resume from); gone once published.
    threads: CPU threads this stage may use. `device`: "cpu" or "cuda".
    mirror: where committed checkpoints are also kept (stages/store/mirror.py), if anywhere.
    """

    scratch: Path
    threads: int = 1
    device: str = "cpu"
    mirror: Any = None

    def log(self, message: str) -> None:
        print(message, flush=True)

    def metrics(self, step: int, **values: float) -> None:
        """Append one point a metric to the stage's series; the parent sends them to MLflow in batches."""
        line = {"step": step, "time": time.time(), **{k: float(v) for k, v in values.items()}}
        with open(self.scratch / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
