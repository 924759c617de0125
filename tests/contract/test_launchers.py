"""What every file of flows/launchers must be: whoever runs a stage can't tell them apart."""

import importlib
import inspect

import pytest
from omegaconf import OmegaConf

from flows import open_launcher
from flows.config import CONF
from flows.launchers import local
from stages.stage import ROOT, ConfigError

NAMES = sorted(path.stem for path in (ROOT.parent / "flows/launchers").glob("[!_]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_launcher(name):
    module = importlib.import_module(f"flows.launchers.{name}")
    assert module.__doc__ and isinstance(module.Launcher.REMOTE, bool)
    for method in ("warm", "launch", "close"):
        found, known = (inspect.signature(getattr(one, method)).parameters for one in (module.Launcher, local.Launcher))
        assert list(found) == list(known)
    assert callable(module.Job.wait) and callable(module.Job.cancel)


def test_every_cluster_names_one():
    for path in (CONF / "cluster").glob("[!_]*.yaml"):
        assert OmegaConf.load(path).launcher in NAMES, path
    with pytest.raises(ConfigError, match="cluster.launcher: 'kubernets' is not known; did you mean 'kubernetes'"):
        open_launcher(OmegaConf.create({"cluster": {"launcher": "kubernets"}}))
