"""Compose a recipe's configuration with Hydra: once, in the parent; stages get resolved JSON.

Every stage's `Config` is a choice of the Hydra group `stage`, every file of conf/expert an entry of `expert`, so that
a new file is known by being there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.stage import ROOT, ConfigError, load, unknown

REFUSED = (HydraException, OmegaConfBaseException, yaml.YAMLError)
CONF = ROOT.parent / "conf"
# What no stage's `Config` types: fields of cluster, recipe, mixing and expert.<name>, what they must be, whether a value is.
RULES = (
    ("cores devices hosts concurrent_stages port models", "a whole number from 1", lambda v: type(v) is int and v > 0),
    ("polish_rounds seeds_kept", "a whole number from 0", lambda v: type(v) is int and v >= 0),
    ("memory_gib flops_per_second", "a number above 0", lambda v: type(v) in (int, float) and v > 0),
    ("price_per_hour", "a number from 0", lambda v: type(v) in (int, float) and v >= 0),
    ("experts also registered parts domains nodes shell", "a list, e.g. [a,b]", lambda v: isinstance(v, ListConfig)),
    ("reward_seeds refine_seeds seeds", "a list of whole numbers, e.g. [0,1]",
     lambda v: isinstance(v, ListConfig) and all(type(one) is int for one in v)),
    ("start", "instruct or base, what the SFT starts from", lambda v: v in ("instruct", "base")),
    ("reward_policy", "instruct or sft-soup", lambda v: v in ("instruct", "sft-soup")),
    ("redo", "true or false", lambda v: isinstance(v, bool)),
    ("anchor", "a share of RL's start, from 0 to less than 1", lambda v: type(v) in (int, float) and 0 <= v < 1),
    ("refine volume", "a section of fields", lambda v: isinstance(v, DictConfig)),
)  # fmt: skip
HOME = re.compile(r"(?<=[\[,=])~(?=[/\],]|$)")  # neither Hydra nor a shell reads it within a list


def choices(group: str) -> tuple[str, ...]:
    """The files of a Hydra group, e.g. `scale`."""
    return tuple(sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml")))


def default(group: str) -> str:
    """The choice of a Hydra group that conf/config.yaml makes."""
    entries = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    return next(entry[group] for entry in entries if isinstance(entry, dict) and group in entry)


def split(overrides: list[str], groups: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """The choices of `groups` among the overrides, and the other overrides."""
    chosen = {key: value for key, eq, value in (o.partition("=") for o in overrides) if eq and key in groups}
    return chosen, [o for o in overrides if o.partition("=")[0] not in groups]


def stage_names() -> list[str]:
    """Every stage: a file stages/<area>/<name>.py that defines OUTPUT (read as text: importing some needs torch)."""
    return [f"{path.parent.name}.{path.stem}" for path in sorted(ROOT.glob("*/*.py"))
            if re.search(r"^OUTPUT\b", path.read_text(), re.MULTILINE)]


def compose(overrides: list[str]) -> DictConfig:
    """The whole configuration. Raises ConfigError with the nearest valid name for an unknown key or choice, and with
    the field, the value and the type for a wrong value."""
    overrides = [HOME.sub(str(Path.home()), override) for override in overrides]
    store = ConfigStore.instance()
    for name in _own_sections(overrides):
        store.store(group="stage", name=name, node=load(name).Config)
    primary, sections = _primary()
    store.store(name="cuvee", node=primary)
    store.store(name="sections", node=sections, package="_global_")
    try:
        conf = _compose(overrides)
    except REFUSED as error:
        try:
            opened = _open_dictionaries(overrides)
            problem = _sentence(error, overrides) if opened == list(overrides) else ""
        except REFUSED:  # not an override's fault: a file of conf/ can't be composed
            problem = _reason(error)
        if problem:
            raise ConfigError(problem) from None
        return compose(opened)
    if any("_target_" in override for override in overrides):
        raise ConfigError("_target_ names code to be run, which no configuration may; leave it out")
    _check(conf, sections)
    _leave_out(conf)
    return conf


def _check(conf: DictConfig, sections: dict) -> None:
    """Raises ConfigError for a value that must be given, for one in place of a section, and for what an expert can't be."""
    for key in sorted(_missing(OmegaConf.to_container(conf))):
        raise ConfigError(f"{key} must be given, e.g. {key}=...; see the comments in conf/{key.split('.')[0]}")
    for key in [*conf, *_places(sections)]:
        if not isinstance(value := OmegaConf.select(conf, key), DictConfig):
            raise ConfigError(f"{key}={value}: {key} is a section of fields, set one of them, e.g. {key}.<field>={value}")
    untyped = {name: conf[name] for name in ("cluster", "recipe", "mixing") if name in conf}
    untyped |= {f"expert.{name}": own for name, own in conf.expert.items()}
    for path, section in untyped.items():
        for fields, what, good in RULES:
            for field in section.keys() & fields.split():
                if not good(section[field]):
                    raise ConfigError(f"{path}.{field}={section[field]}: it must be {what}")
        if "seeds" in section and not section.seeds:
            raise ConfigError(f"{path}.seeds is empty; give at least one, e.g. [0]")
    for field in ("experts", "also"):
        for expert in conf.recipe.get(field, []):
            if expert not in conf.expert:
                raise ConfigError(f"recipe.{field}: {unknown(expert, list(conf.expert))}")
    if not conf.recipe.experts:
        raise ConfigError("recipe.experts is empty; name at least one of " + ", ".join(conf.expert))


def _places(sections: dict, path: str = "") -> Iterator[str]:
    """Where sections are, from the outside in: expert, expert.code, expert.code.sft, ..."""
    for key, value in sections.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from _places(value, f"{path}{key}.")


def _leave_out(conf: DictConfig) -> None:
    """An expert that is left out has no prompts to mix in, and no model to weigh."""
    with_prompts = {*conf.recipe.experts, *conf.recipe.get("also", [])}
    for expert in conf.recipe.experts:
        for part in (conf.expert[expert].sft, conf.expert[expert].refine, conf.expert[expert].rl):
            part.mix = {d: share for d, share in part.mix.items() if d in with_prompts or d not in conf.expert}
    for part in (conf.soup.sft, conf.soup.rl):
        part.weights = {e: weight for e, weight in part.weights.items() if e in conf.recipe.experts or e not in conf.expert}


def _missing(node: Any, path: str = "") -> Iterator[str]:
    """The keys whose value is ???, which a user must give."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _missing(value, f"{path}.{key}" if path else str(key))
    elif node == MISSING:
        yield path


def _compose(overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("cuvee", overrides=[*_always(overrides), *overrides])


def _recipe(overrides: list[str]) -> dict:
    """The chosen recipe's file; empty where there is none of that name."""
    path = CONF / "recipe" / f"{split(overrides, ('recipe',))[0].get('recipe', default('recipe'))}.yaml"
    return yaml.safe_load(path.read_text()) if path.exists() else {}


def _always(overrides: list[str]) -> list[str]:
    """What the chosen recipe is, whatever the scale: the overrides that its file lists under `always`. The user's win."""
    found = _recipe(overrides)
    return found.get("recipe", found).get("always", [])


def _own_sections(overrides: list[str]) -> list[str]:
    """The stages of the sections that the chosen recipe's file adds."""
    entries = [one for one in _recipe(overrides).get("defaults", []) if isinstance(one, dict)]
    return [stage for one in entries for key, stage in one.items() if key.startswith("/stage@")]


def _open_dictionaries(overrides: list[str]) -> list[str]:
    """The overrides with `++` before those that add a key to a dictionary field (rewards, weights, mix, options; cluster.env
    and its like, which are empty): Hydra takes a dictionary's keys of today for all that may ever be."""
    base, opened = _compose(_groups(overrides)), []
    for override in overrides:
        key = override.partition("=")[0]
        node, free = base, False
        for part in key.split("."):
            inside = isinstance(node, DictConfig) and OmegaConf.get_type(node) not in (dict, None)
            node = OmegaConf.select(node, part) if isinstance(node, DictConfig) and part in node else None
            free = free or (isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict and (inside or not node))
        opened.append(f"++{override}" if free and override[0] not in "+~" else override)
    return opened


def _groups(overrides: list[str]) -> list[str]:
    """The overrides that choose a file of a group which is there: a recipe may bring sections of its own."""
    parts = [(one, *one.lstrip("+~").partition("=")[::2]) for one in overrides]
    return [one for one, key, value in parts if (CONF / key.split("@")[0] / f"{value}.yaml").exists()]


def _primary() -> tuple[dict, dict]:
    """(conf/config.yaml as Hydra takes it, the sections that its `stage@` entries name). `experts` stands for every expert.
    Hydra takes all sections as one node: one by one they would take it twice as long."""
    primary = yaml.safe_load((CONF / "config.yaml").read_text())
    experts, others, sections = choices("expert"), [], {}
    for entry in primary["defaults"]:
        (key, choice), *_ = entry.items() if isinstance(entry, dict) else [(entry, "")]
        if key == "experts":
            others += [{f"expert@expert.{name}": name} for name in experts]
        elif key.startswith("stage@"):
            *path, last = key.removeprefix("stage@").split(".")
            for head in [["expert", name] for name in experts] if path == ["experts"] else [path]:
                reduce(lambda node, part: node.setdefault(part, {}), head, sections)[last] = load(choice).Config
        else:
            others.append(entry)
    return primary | {"defaults": ["sections", *others]}, sections


def _sentence(error: Exception, overrides: list[str]) -> str:
    """What is wrong with which override, and the nearest valid name."""
    reason = _reason(error)
    for override in sorted(overrides, key=lambda one: len(one.partition("=")[0]), reverse=True):  # cluster.x, then cluster
        key, eq, value = override.lstrip("+~").partition("=")
        if not eq:
            return f"override {override!r} has no value; write it as key=value, e.g. expert.math.sft.lr=1e-3"
        group = key.split("@")[0]
        if (CONF / group).is_dir() and not (CONF / group / f"{value}.yaml").exists():
            return f"{key}: {unknown(value, list(choices(group)))}"
        if override in str(error).splitlines()[0] or key in str(error) or key.split(".")[-1] in reason:
            if "is not a ListConfig" in reason:
                reason = f"it takes a list: {key}=[{value}]"
            problem = _unknown_key(key, _groups(overrides))
            return problem or f"{key}={value}: {reason}"
    return reason


def _reason(error: BaseException) -> str:
    """What was wrong: with the file of conf/ where Hydra or YAML name one, and the key where OmegaConf does."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}"
    inside = re.compile(r"In '?([\w/]+)'?: ")
    lines = str(error.__cause__ or error.__context__ or error).splitlines()
    what = inside.sub("", lines[0])
    place = inside.match(str(error))
    if not place:
        return what
    key = next((line.partition("full_key: ")[2] for line in lines if "full_key: " in line), "")
    return f"conf/{place[1].replace('cuvee', 'config')}.yaml: {key and f'{key}: '}{what}"


def _unknown_key(key: str, groups: list[str]) -> str | None:
    node = _compose(groups)
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, DictConfig):
            return f"{key}: {'.'.join(parts[:depth])} is a value, it has no fields"
        if part not in node:
            return f"{key}: {unknown(part, list(node))}"
        node = OmegaConf.select(node, part)
    return None


def state_dir() -> Path:
    """Where runs leave their state: `.cuvee/` below the working directory, or $CUVEE_STATE."""
    return Path(os.environ.get("CUVEE_STATE", ".cuvee")).absolute()
