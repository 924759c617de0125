"""What every file of a registry must be: a new stage, objective, task, reward or merge method is tested by being there."""

import ast
import dataclasses
import re
import subprocess
import sys

import pytest

from flows.config import stage_names
from stages import stage as stages
from stages.stage import ROOT, Input, Kind

STAGES = stage_names()


@pytest.mark.parametrize("name", STAGES)
def test_stage(name):
    module = stages.load(name)
    assert isinstance(module.VERSION, str) and isinstance(module.OUTPUT, Kind)
    assert all(isinstance(one, Input) for one in module.INPUTS.values())
    assert callable(module.run) and module.__doc__
    check_config(module.Config)


def check_config(config_type):
    for field in dataclasses.fields(config_type):
        assert field.metadata.get("help"), f"{config_type.__name__}.{field.name} has no one-line meaning"
        choices = field.metadata.get("choices")
        if isinstance(choices, str):
            assert stages.names(choices), f"{field.name}: the folder stages/{choices} holds no choice"
        if dataclasses.is_dataclass(field.type):
            check_config(field.type)
    assert stages.parse(config_type, {}, "x") == config_type()
    assert not any("_target_" in key for key in stages.identity(config_type()))


def test_importing_stages_and_planning_import_neither_torch_nor_prefect():
    code = ("import sys; from flows.config import stage_names; from stages.stage import load\n"
            "import flows.graph, flows.plan, flows.lineage, flows.cli\n"
            "[load(n) for n in stage_names()]\n"
            "print([m for m in ('torch', 'prefect', 'mlflow', 'transformers', 'megatron') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_only_flows_imports_prefect():
    for path in ROOT.rglob("*.py"):
        assert not re.search(r"^\s*(import|from) (prefect|flows)\b", path.read_text(), re.M), path


@pytest.mark.parametrize("name", stages.names("model/families"))
def test_model_family(name):
    from stages.model.config import Traits
    from tests.parity.families import FAMILIES

    module = stages.resolve("model/families", name)
    assert isinstance(module.TRAITS, Traits) and module.TRAITS.norm in ("layernorm", "rmsnorm")
    config = FAMILIES[name]  # tests/parity compares a model of every family with transformers'
    config.check()
    hf = config.to_hf()
    assert hf["model_type"] == name and type(config).from_hf(hf) == config


def test_counting_parameters_imports_no_torch():
    code = ("import sys; from stages.stage import names, resolve; from stages.model.config import ModelConfig\n"
            "[resolve('model/families', n) for n in names('model/families')]; ModelConfig().parameters()\n"
            "ModelConfig.from_hf(ModelConfig().to_hf()); print('torch' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("name", stages.names("objectives"))
def test_objective(name):
    module = stages.resolve("objectives", name)
    assert dataclasses.is_dataclass(module.Config) and isinstance(module.NEEDS_REFERENCE, bool)
    assert isinstance(module.NEEDS_SCORES, bool) and isinstance(module.NEEDS_BEHAVIOUR, bool)
    assert module.GROUP in ("single", "pair", "completions", "revisions")
    assert module.COUNT in ("groups", "sequences", "tokens")  # what the loss is a mean over
    assert module.loss.__doc__ and module.__doc__
    check_config(module.Config)


@pytest.mark.parametrize("name", stages.names("tasks"))
def test_task(name):
    """A right answer is worth 1, an empty one less, and a task is a function of its seed."""
    import random

    module = stages.resolve("tasks", name)
    text = "\n".join(f"Sentence number {n} tells of a river, a mountain and a harbour." for n in range(400))
    documents = [{"id": "d", "text": text, "domain": "prose", "language": "en", "source": "s"}]
    prompts, again = (list(module.generate(random.Random(7), 20, documents, module.Options())) for _ in range(2))
    assert len(prompts) == 20 and prompts == again
    for prompt in prompts:
        assert prompt["messages"][-1]["role"] == "user"
        assert module.verify(prompt, prompt["answer"]) == 1.0
        assert -1.0 <= module.verify(prompt, "") < 1.0


@pytest.mark.parametrize("folder", ["merge/methods", "rewards", "rollout/engines", "data/blocks", "data/sources", "data/formats", "data/executors"])
def test_registered_modules_import_and_say_what_they_are(folder):
    for name in stages.names(folder):
        assert stages.resolve(folder, name).__doc__, f"stages/{folder}/{name}.py has no docstring"


def test_no_file_instantiates_from_configuration():
    """Hydra's _target_ runs code named by data: it has no place here."""
    for folder in (ROOT, ROOT.parent / "flows"):
        for path in folder.rglob("*.py"):
            called = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
            assert not called & {"instantiate", "hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_method"}, path
