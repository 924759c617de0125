"""Compose a recipe's configuration with Hydra: once, in the parent; stages get resolved JSON.

Every stage's `Config` is a choice of the Hydra group `stage`, every file of conf/expert an entry of `expert`, so that
a new file is known by being there.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.stage import ROOT, ConfigError, load, unknown

CONF = ROOT.parent / "conf"
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
    for name in stage_names():
        store.store(group="stage", name=name, node=load(name).Config)
    store.store(name="cuvee", node=_primary())
    try:
        conf = _compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        opened = _open_dictionaries(overrides)
        if opened == list(overrides):
            raise ConfigError(_sentence(error, overrides)) from None
        return compose(opened)
    if any("_target_" in override for override in overrides):
        raise ConfigError("_target_ names code to be run, which no configuration may; leave it out")
    for key in sorted(OmegaConf.missing_keys(conf)):
        raise ConfigError(f"{key} must be given, e.g. {key}=...; see the comments in conf/{key.split('.')[0]}")
    for key, value in conf.items():
        if not isinstance(value, DictConfig):
            raise ConfigError(f"{key}={value}: {key} is a section of fields, set one of them, e.g. {key}.<field>={value}")
    for expert in conf.recipe.experts:
        if expert not in conf.expert:
            raise ConfigError(f"recipe.experts: {unknown(expert, list(conf.expert))}")
    if not conf.recipe.experts:
        raise ConfigError("recipe.experts is empty; name at least one of " + ", ".join(conf.expert))
    left_out = [expert for expert in conf.expert if expert not in conf.recipe.experts]
    for expert in conf.recipe.experts:  # an expert that is left out has no prompts to mix in, and no model to weigh
        for part in (conf.expert[expert].sft, conf.expert[expert].refine, conf.expert[expert].rl):
            part.mix = {d: share for d, share in part.mix.items() if d not in left_out}
    for part in (conf.soup.sft, conf.soup.rl):
        part.weights = {e: weight for e, weight in part.weights.items() if e not in left_out}
    return conf


def _compose(overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("cuvee", overrides=[*_always(overrides), *overrides])


def _always(overrides: list[str]) -> list[str]:
    """What the chosen recipe is, whatever the scale: the overrides that its file lists under `always`. The user's win."""
    path = CONF / "recipe" / f"{split(overrides, ('recipe',))[0].get('recipe', default('recipe'))}.yaml"
    found = yaml.safe_load(path.read_text()) if path.exists() else {}
    return found.get("recipe", found).get("always", [])


def _open_dictionaries(overrides: list[str]) -> list[str]:
    """The overrides with `++` before those that add a key to a dictionary field (rewards, weights, mix, options):
    Hydra takes a dictionary's keys of today for all that may ever be."""
    base, opened = _compose(_groups(overrides)), []
    for override in overrides:
        key = override.partition("=")[0]
        node, free = base, False
        for part in key.split("."):
            inside = isinstance(node, DictConfig) and OmegaConf.get_type(node) not in (dict, None)
            node = OmegaConf.select(node, part) if isinstance(node, DictConfig) and part in node else None
            free = free or (inside and isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict)
        opened.append(f"++{override}" if free and override[0] not in "+~" else override)
    return opened


def _groups(overrides: list[str]) -> list[str]:
    """The overrides that choose a file of a group which is there: a recipe may bring sections of its own."""
    parts = [(one, *one.lstrip("+~").partition("=")[::2]) for one in overrides]
    return [one for one, key, value in parts if (CONF / key.split("@")[0] / f"{value}.yaml").exists()]


def _primary() -> dict:
    """conf/config.yaml with every expert's file added to its defaults, where the word `experts` stands."""
    primary = yaml.safe_load((CONF / "config.yaml").read_text())
    experts = [{f"expert@expert.{p.stem}": p.stem} for p in sorted((CONF / "expert").glob("[!_]*.yaml"))]
    at = primary["defaults"].index("experts")
    primary["defaults"][at : at + 1] = experts
    return primary


def _sentence(error: Exception, overrides: list[str]) -> str:
    """What is wrong with which override, and the nearest valid name."""
    reason = str(error.__cause__ or error).splitlines()[0]
    for override in overrides:
        key, eq, value = override.lstrip("+~").partition("=")
        if not eq:
            return f"override {override!r} has no value; write it as key=value, e.g. expert.math.sft.lr=1e-3"
        group = CONF / key.split("@")[0]
        if group.is_dir() and (group / f"{value}.yaml").exists() is False:
            choices = sorted(p.stem for p in group.glob("[!_]*.yaml"))
            return f"{key}: {unknown(value, choices)}"
        if str(error).splitlines()[0].find(override) >= 0 or key in str(error) or key.split(".")[-1] in reason:
            problem = _unknown_key(key, _groups(overrides))
            return problem or f"{key}={value}: {reason}"
    return reason


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
    import os

    return Path(os.environ.get("CUVEE_STATE", ".cuvee")).absolute()
