"""The graph of a recipe: every stage with its configuration, inputs and address, known before anything runs.

A recipe is a function `recipe(step, conf)` in flows/<name>.py. Each call of `step` adds a node; nothing is executed
and neither torch nor Prefect is imported, so the same function serves plan, run and lineage.
"""

from __future__ import annotations

import importlib
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from stages import stage as stages
from stages.stage import ConfigError, Estimate, Kind
from stages.store.record import fingerprint


@dataclass(frozen=True, eq=False)
class Node:
    """One artifact to be: `name` in the recipe (its alias in the store), the stage that makes it, and from what."""

    name: str
    stage: str
    config: Any
    inputs: dict[str, Any] = field(default_factory=dict)  # argument -> Node, or argument -> {key: Node}
    where: str = ""  # the section of the configuration that `config` is

    @cached_property
    def module(self):
        return stages.load(self.stage)

    @property
    def kind(self) -> Kind:
        return self.module.OUTPUT

    @cached_property
    def identity(self) -> dict[str, Any]:
        return stages.identity(self.config)

    @cached_property
    def external(self) -> dict[str, Any]:
        return self.module.external(self.config) if hasattr(self.module, "external") else {}

    @cached_property
    def fingerprint(self) -> str:
        inputs = self.map_inputs(lambda node: node.fingerprint)
        return fingerprint(self.stage, self.module.VERSION, self.identity, self.external, inputs)

    @cached_property
    def estimate(self) -> Estimate:
        if not hasattr(self.module, "estimate"):
            return Estimate()
        return self.module.estimate(self.config, self.map_inputs(lambda node: node.estimate))

    @property
    def distributed(self) -> bool:
        """Whether the stage runs as one process a device."""
        return getattr(self.module, "DISTRIBUTED", False)

    @property
    def needs_device(self) -> bool:
        """Whether a model may run in the stage; the others leave the GPUs to those that need them."""
        return self.kind not in (Kind.CORPUS, Kind.TOKENIZER, Kind.TOKENS, Kind.REPORT)

    @property
    def parents(self) -> list[Node]:
        return [n for one in self.inputs.values() for n in (one.values() if isinstance(one, dict) else [one])]

    def map_inputs(self, function) -> dict[str, Any]:
        """The inputs with `function` applied to each node, in the same shape."""
        return {
            arg: {key: function(node) for key, node in one.items()} if isinstance(one, dict) else function(one)
            for arg, one in self.inputs.items()
        }


class Graph:
    """The nodes of a recipe in an order in which they can run."""

    def __init__(self, conf: DictConfig):
        self.conf = conf
        self.nodes: dict[str, Node] = {}
        module = importlib.import_module(f"flows.{conf.recipe.name}")
        try:
            module.recipe(self.step, conf)
        except OmegaConfBaseException as error:  # a recipe puts values of one section into another
            raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None

    def step(self, name: str, stage: str, config: DictConfig, **inputs: Any) -> Node:
        """Add a stage. An input that is None or an empty dictionary is left out; a wrong kind raises ConfigError."""
        if name in self.nodes:
            raise ConfigError(f"recipe {self.conf.recipe.name}: two stages are called {name!r}; names must differ")
        module = stages.load(stage)
        inputs = {arg: one for arg, one in inputs.items() if one}
        _check_inputs(name, module, inputs)
        where = config._get_full_key("")
        node = Node(name, stage, stages.parse(module.Config, config, where), inputs, where)
        if hasattr(module, "check"):
            try:
                module.check(node.config, node.map_inputs(lambda n: n.config))
            except ConfigError as error:
                raise ConfigError(f"{where}.{error}") from None
        self.nodes[name] = node
        return node

    def until(self, targets: list[str]) -> list[Node]:
        """The nodes that the targets need, themselves included; every node without targets."""
        for target in targets:
            if target not in self.nodes:
                raise ConfigError(f"until: {stages.unknown(target, list(self.nodes))}")
        wanted = [self.nodes[t] for t in targets] or list(self.nodes.values())
        needed: set[Node] = set()
        while wanted:
            node = wanted.pop()
            if node not in needed:
                needed.add(node)
                wanted += node.parents
        return [node for node in self.nodes.values() if node in needed]


class Frontier:
    """What can be made as soon as something else is. Of any thread."""

    def __init__(self, nodes: list[Node]):
        self._parents = {node.name: {parent.name for parent in node.parents} for node in nodes}
        self._made: set[str] = set()
        self._turn = threading.Lock()

    def after(self, name: str) -> list[str]:
        """The stages for which nothing was missing any more but this one, which is made now."""
        with self._turn:
            self._made.add(name)
            return [other for other, needs in self._parents.items() if name in needs and needs <= self._made]


def unaccompanied(nodes: list[Node]) -> set[str]:
    """The names of the nodes beside which no other can run: each of the others needs them, or is needed by them."""
    above: dict[str, set[str]] = {}
    for node in nodes:
        above[node.name] = {p.name for p in node.parents}.union(*(above[p.name] for p in node.parents))
    below = Counter(name for names in above.values() for name in names)
    return {name for name, names in above.items() if len(names) + below[name] == len(nodes) - 1}


def _check_inputs(name: str, module: Any, inputs: dict[str, Any]) -> None:
    for arg, one in inputs.items():
        if arg not in module.INPUTS:
            raise ConfigError(f"{name}: input {stages.unknown(arg, list(module.INPUTS))}")
        wanted = module.INPUTS[arg]
        if isinstance(one, dict) != wanted.many:
            shape = "a dictionary of artifacts" if wanted.many else "one artifact"
            raise ConfigError(f"{name}: input {arg!r} takes {shape}")
        for node in one.values() if wanted.many else [one]:
            if node.kind is not wanted.kind:
                raise ConfigError(f"{name}: input {arg!r} is a {node.kind.value} ({node.name}); "
                                  f"a {wanted.kind.value} was expected")
    for arg, wanted in module.INPUTS.items():
        if arg not in inputs and not wanted.optional:
            raise ConfigError(f"{name}: input {arg!r} ({wanted.kind.value}) is missing")
