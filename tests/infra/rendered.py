"""The manifests of infra/kubernetes as kustomize renders them."""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "infra/kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())


@functools.cache
def build(folder):
    """The objects of a kustomization. Skips where neither kustomize nor kubectl is installed."""
    program = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    if not shutil.which(program[0]):
        pytest.skip("needs kustomize (Debian has it) or kubectl")
    out = subprocess.run([*program, str(folder)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return list(yaml.safe_load_all(out.stdout))


def overlay(name):
    return build(KUBERNETES / "overlays" / name)


def with_component(name, folder):
    """The base with one component, written to `folder`."""
    up = os.path.relpath(KUBERNETES, folder)
    wanted = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": "cuvee",
              "resources": [f"{up}/base"], "components": [f"{up}/components/{name}"]}  # fmt: skip
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
    return build(folder)


def of_kind(objects, *kinds):
    return [one for one in objects if one["kind"] in kinds]


def pods(objects):
    """(name, pod template) of everything that makes pods."""
    return [(one["metadata"]["name"], one["spec"]["template"]) for one in of_kind(objects, "Deployment", "StatefulSet", "Job")]


def worker(objects):
    return next(template["spec"]["containers"][0] for name, template in pods(objects) if name == "worker")
