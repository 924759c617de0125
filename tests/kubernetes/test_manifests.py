"""What is sent to a cluster: golden files, and Kubernetes' own schemas, strictly, from 1.30 on.

`python -m tests.kubernetes.test_manifests` writes the golden files anew.
"""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from omegaconf import OmegaConf

from flows.config import CONF
from flows.launchers import _kubernetes_manifests as manifests
from flows.launchers.kubernetes import settings
from stages.stage import ConfigError

GOLDEN = Path(__file__).parent / "golden"
CLUSTER = yaml.safe_load((CONF / "cluster/kubernetes.yaml").read_text()) | {
    "image": "registry.example/cuvee-train:0.1.0", "data_image": "registry.example/cuvee-data:0.1.0"}  # fmt: skip
ALONE = {"name": "cuvee-corpus-0123456789ab-0", "spec": "/cuvee/work/0123/spec.json", "digest": "d1", "threads": 16}
WHOLE = ALONE | {"name": "cuvee-base-0123456789ab-0", "hosts": 2, "processes": 16, "device": "cuda"}
QUEUED = {"queue": "training", "priority_class": "cuvee-training", "secrets": ["bucket"], "config_maps": ["fabric"],
          "resources": {"rdma/hca": "8"}, "env": {"NCCL_SOCKET_IFNAME": "eth0", "PS1": "$(date) "},
          "pod": {"nodeSelector": {"pool": "h100"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]}}  # fmt: skip
CASES = {
    "one_pod": ({}, ALONE),
    "two_hosts": ({}, WHOLE),
    "one_host": ({}, WHOLE | {"hosts": 1, "processes": 8}),
    "queued": (QUEUED, WHOLE | {"flow": "cuvee-run-1"}),
    "jobset": ({"kind": "jobset", "queue": "training"}, WHOLE),
    "trainjob": ({"kind": "trainjob", "queue": "training"}, WHOLE),
}


def rendered(case: str) -> list[dict]:
    changes, stage = CASES[case]
    return manifests.render(settings(OmegaConf.create(CLUSTER | changes)), manifests.Stage(**stage))


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    assert list(yaml.safe_load_all((GOLDEN / f"{case}.yaml").read_text())) == rendered(case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", ["1.30", "1.33", "1.36"])
def test_kubernetes_knows_every_field(case, version):
    checked = 0
    for manifest in rendered(case):
        inner = manifest["spec"].get("template", manifest)["spec"].get("replicatedJobs", [])
        for job in [one["template"] for one in inner]:  # of kinds that Kubernetes itself does not have: the jobs in them
            checked += validated({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job["spec"]}, version)
        if manifest["apiVersion"] in ("v1", "batch/v1"):
            checked += validated(manifest, version)
    assert checked


def validated(manifest: dict, version: str) -> bool:
    kubernetes_validate.validate(manifest, version, strict=True)
    return True


@pytest.mark.parametrize("case", CASES)
def test_what_holds_for_all(case):
    """No secret but by reference, no shell, no rights, one name for everything."""
    text = yaml.safe_dump_all(rendered(case))
    assert "sh -c" not in text and "/bin/sh" not in text and "secretKeyRef" not in text
    names = {manifest["metadata"]["name"] for manifest in rendered(case)}
    assert names == {CASES[case][1]["name"]} and "automountServiceAccountToken: false" in text
    assert "allowPrivilegeEscalation: false" in text and "runAsNonRoot: true" in text


def test_settings_are_checked():
    def found(**changes):
        return settings(OmegaConf.create(CLUSTER | changes))

    for changes, sentence in (
        ({"kind": "job_set"}, "cluster.kind: 'job_set' is not known; did you mean 'jobset'"),
        ({"restarts": "many"}, "cluster.restarts: .*'many'"),
        ({"image": ""}, "cluster.image is empty; give the image"),
        ({"hosts": 3}, "cluster.devices: 16 do not divide into cluster.hosts=3"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            found(**changes)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in CASES:
        (GOLDEN / f"{name}.yaml").write_text(yaml.safe_dump_all(rendered(name), sort_keys=False, width=120))
