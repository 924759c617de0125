"""One suite, two places: the test server of this folder, or the cluster of KUBECONFIG.

A real cluster needs  CUVEE_TEST_IMAGE   an image of infra/images with this checkout
                      CUVEE_TEST_VOLUME  "claim:path" of a claim that is mounted at `path` where the tests run too
                      the rights of infra/kubernetes/base/rbac.yaml in the context's namespace
and is asked for nothing else; what only a server of our own can do (lose a node, forget its history) is skipped there.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from flows.config import CONF
from flows.launchers import _kubernetes_manifests as manifests
from flows.launchers.kubernetes import Launcher
from stages.stage import ROOT
from tests.kubernetes.apiserver import TOKEN
from tests.kubernetes.controllers import Cluster

REAL = os.environ.get("KUBECONFIG", "")
FINISH = "import json; open({result!r}, 'w').write(json.dumps({{'status': 0, 'metrics': {{}}, 'series': {{}}}}))\n"


class Place:
    """A cluster, and a volume that its pods share with the tests."""

    def __init__(self, volume: Path, claim: str, image: str, local: Cluster | None):
        self.volume, self.claim, self.image, self.local = volume, claim, image, local
        self.launched = []

    def cluster(self, **changes):
        from omegaconf import OmegaConf

        values = yaml.safe_load((CONF / "cluster/kubernetes.yaml").read_text())
        values |= {"device": "cpu", "devices": 2, "cores": 1, "data_image": self.image, "host_memory_gib": 1, "shm_gib": 0.1,
                   "grace_seconds": 5, "volume": {"claim": self.claim, "path": str(self.volume)}, "user": os.getuid() or 10001,
                   "keep_seconds": 600}  # fmt: skip
        return OmegaConf.create(values | changes)

    def launcher(self, **changes) -> Launcher:
        launcher = Launcher(self.cluster(**changes))
        self.launched.append(launcher)
        return launcher

    def spec(self, processes: int = 1, name: str = "a stage", folder: str = "") -> Path:
        """A spec file; what it says of the stage itself is for `python -m stages.launch` alone."""
        root = self.volume / (folder or f"{time.time_ns():x}")
        root.mkdir(exist_ok=True)
        spec = {"stage": "none", "name": name, "inputs": {}, "processes": processes, "device": "cpu", "threads": 1,
                "result": str(root / "result.json")}  # fmt: skip
        (root / "spec.json").write_text(json.dumps(spec))
        return root / "spec.json"

    def only_local(self) -> Cluster:
        if self.local is None:
            pytest.skip("a real cluster is not ours to break")
        return self.local

    def evict(self, pod: str) -> None:
        """As a drain or a pre-emption does."""
        if self.local:
            return self.local.objects.evict(pod)
        api = self.launched[-1].api
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
        api._json("POST", api._path("Pod", pod) + "/eviction", {}, body)


def rights() -> set[tuple[str, str, str]]:
    """(group, resource, verb) that infra/kubernetes gives to a run, lost nodes included."""
    files = [ROOT.parent / "infra/kubernetes" / name for name in ("base/rbac.yaml", "components/node-loss/rbac.yaml")]
    roles = [one for file in files for one in yaml.safe_load_all(file.read_text()) if one["kind"].endswith("Role")]
    return {(group, resource, verb) for role in roles for rule in role["rules"] for group in rule["apiGroups"]
            for resource in rule["resources"] for verb in rule["verbs"]}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    if REAL:
        if not (os.environ.get("CUVEE_TEST_IMAGE") and os.environ.get("CUVEE_TEST_VOLUME")):
            pytest.skip("KUBECONFIG is set, but not CUVEE_TEST_IMAGE and CUVEE_TEST_VOLUME (see tests/kubernetes/conftest.py)")
        claim, _, path = os.environ["CUVEE_TEST_VOLUME"].partition(":")
        os.umask(0)  # the pods may run as somebody else
        volume = Path(path) / tmp_path.name
        volume.mkdir(parents=True)
        yield (found := Place(volume, claim, os.environ["CUVEE_TEST_IMAGE"], None))
    else:
        local = Cluster(rights())
        user = {"name": "me", "user": {"token": TOKEN}}
        context = {"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "default"}}
        config = {"clusters": [{"name": "here", "cluster": {"server": local.server.url}}], "users": [user],
                  "contexts": [context], "current-context": "here"}  # fmt: skip
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        (tmp_path / "volume").mkdir()
        yield (found := Place(tmp_path / "volume", "cuvee", "cuvee-data:test", local))
        local.close()
    for launcher in found.launched if REAL else []:
        for job in launcher.api.list("Job", labelSelector="app.kubernetes.io/name=cuvee")["items"]:
            launcher.api.delete("Job", job["metadata"]["name"])


@pytest.fixture
def program(monkeypatch):
    """Let the pods run another Python program than the stage's launcher; `finish` in it leaves a result as a stage does."""

    def put(spec: Path, text: str) -> None:
        finish = FINISH.format(result=json.loads(spec.read_text())["result"])
        text = text.replace("finish()", finish.strip())
        real = manifests._pod

        def pod(settings, stage):
            found = real(settings, stage)
            if stage.spec == str(spec):
                found["containers"][0]["command"] = ["python", "-u", "-c", text]
            return found

        monkeypatch.setattr(manifests, "_pod", pod)

    return put


def until(true, seconds: float = 60.0):
    """What `true` gives as soon as that is something."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found
