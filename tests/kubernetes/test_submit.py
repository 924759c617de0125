"""A whole run in the cluster, its plan, and stages through the maker: an artifact appears as if it had been made here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows import open_store, submit
from flows.config import compose
from flows.graph import Graph
from flows.launchers._kubernetes_api import Refused
from flows.launchers.local import Launcher
from flows.plan import dry_run
from flows.step import Maker
from stages.stage import ConfigError, CuveeError
from stages.store.local import LocalStore
from tests.kubernetes.conftest import until
from tests.unit.test_step import NoTracker, documents, node  # noqa: F401 (a fixture)


def overrides(place, *more: str) -> list[str]:
    cluster = {key: value for key, value in place.cluster().items() if key != "volume"}
    chosen = ("device", "devices", "cores", "data_image", "host_memory_gib", "shm_gib", "grace_seconds", "user")
    return ["cluster=kubernetes", "cluster.hosts=1", *(f"cluster.{key}={cluster[key]}" for key in chosen),
            f"cluster.volume.claim={place.claim}", f"cluster.volume.path={place.volume}", *more]  # fmt: skip


def test_an_artifact_made_by_a_pod_equals_one_made_here(place, documents):  # noqa: F811
    copied = place.volume / "docs"
    shutil.move(documents, copied)
    stores = []
    for name, launcher in (("there", place.launcher()), ("here", Launcher())):
        store = LocalStore(place.volume / name)
        lines = []
        Maker(store, launcher, NoTracker(), place.volume / f"work-{name}", 1).make(node([copied]), True, 0, lines.append)
        assert any("documents removed" in line for line in lines)
        stores.append({r["fingerprint"]: r["files"] for r in map(store.record, store.fingerprints())})
        launcher.close()
    assert stores[0] == stores[1] and stores[0]
    short = copied / "short"
    short.mkdir()
    (short / "a.txt").write_text("too short")
    with pytest.raises(CuveeError, match="^corpus: "):
        Maker(LocalStore(place.volume / "there"), place.launcher(), NoTracker(), place.volume / "work", 1).make(
            node([short]), True, 0, print)  # fmt: skip


def test_plan_asks_the_cluster_and_leaves_nothing(place):
    graph = Graph(compose(overrides(place)))
    (line,) = dry_run(graph, list(graph.nodes.values()))
    assert "would accept the jobs (2 kinds of pods, dry run)" in line
    assert place.launcher().api.list("Job", labelSelector="app.kubernetes.io/name=cuvee")["items"] == []
    graph = Graph(compose(overrides(place, "+cluster.pod.nodeSelectr={pool: h100}")))
    with pytest.raises(Refused, match="nodeSelectr|Additional properties"):
        list(dry_run(graph, list(graph.nodes.values())))
    local = Graph(compose([]))
    assert list(dry_run(local, list(local.nodes.values()))) == []


def test_plan_without_a_cluster_says_so(place, monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    graph = Graph(compose(overrides(place)))
    (line,) = dry_run(graph, list(graph.nodes.values()))
    assert line.startswith("the manifests were not checked: ")


def test_a_volume_that_is_not_mounted_is_not_made(place, tmp_path):
    wanted = [one for one in overrides(place) if "volume.path" not in one]
    with pytest.raises(ConfigError, match="is not mounted here at .*nowhere; use cuvee submit, or a bucket"):
        open_store(compose([*wanted, f"cluster.volume.path={tmp_path}/nowhere"]))
    assert not (tmp_path / "nowhere").exists()


def test_submit_refuses_before_it_asks(place):
    for wrong, sentence in (
        ([], "cluster=local starts stages with launcher local, but submit runs on Kubernetes"),
        (overrides(place, "store.uri=/home/me/store"), "not on the volume that the pods share"),
        (overrides(place, "data.sources=[stdlib,~/docs]"), f"data.sources: {Path.home()}/docs would be read in the cluster"),
        (overrides(place, "conversations.sources=[chats.jsonl]"), "conversations.sources: chats.jsonl would be read"),
        (overrides(place, "expert.math.prompts.files=[sums.jsonl]"), "expert.math.prompts.files: sums.jsonl would be read"),
        (overrides(place, "recipe.experts=[code]", "recipe.also=[rag]", "expert.rag.prompts.files=[a.jsonl]"),
         "expert.rag.prompts.files: a.jsonl would be read"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            submit.submit(wrong, "", follow=True, cancel=False)
    with pytest.raises(ConfigError, match="no run of these overrides is under way"):
        submit.submit(overrides(place), "", follow=True, cancel=True)


def test_a_run_in_the_cluster_makes_its_stages_there(place, documents, capsys):  # noqa: F811
    """The run's pod makes a stage's pod, which it owns, and publishes what that leaves."""
    shutil.move(documents, place.volume / "docs")
    wanted = overrides(place, "scale=micro", f"data.sources=[{place.volume}/docs]")
    api = place.launcher().api
    if place.local:  # what a pod finds in a real cluster
        place.local.variables = {"KUBECONFIG": os.environ["KUBECONFIG"]}
    status = submit.submit(wanted, "corpus", follow=True, cancel=False)
    out = capsys.readouterr().out
    assert status == 0, out
    (owned,) = [job for job in api.list("Job")["items"] if job["metadata"]["name"].startswith("cuvee-corpus-")]
    assert owned["metadata"]["ownerReferences"][0]["name"].startswith("cuvee-run-")
    store = LocalStore(place.volume / "store")
    record = store.record(store.aliases()["corpus"])
    assert record["files"] and f"job {owned['metadata']['name']}" in (place.volume / "work" / record["fingerprint"] / "log.txt").read_text()
    assert "1 of 1 stages to make" in out and "[  1/1] corpus" in out


def test_cancel_ends_the_run_and_its_stages(place, program, capsys, monkeypatch):
    api = place.launcher(grace_seconds=1).api
    from flows.launchers import _kubernetes_manifests as manifests

    real = manifests.run_job

    def waits(*arguments):
        job = real(*arguments)
        job["spec"]["template"]["spec"]["containers"][0]["command"] = ["python", "-c", "import time; time.sleep(600)"]
        return job

    monkeypatch.setattr(manifests, "run_job", waits)
    wanted = overrides(place)
    assert submit.submit(wanted, "", follow=False, cancel=False) == 0
    assert submit.submit(wanted, "", follow=False, cancel=False) == 0
    out = capsys.readouterr().out
    assert out.count("was created") == 1 and out.count("goes on") == 1
    (run,) = api.list("Job", labelSelector="app.kubernetes.io/name=worker")["items"]
    monkeypatch.setenv("CUVEE_FLOW_JOB", run["metadata"]["name"])
    monkeypatch.setenv("CUVEE_FLOW_UID", run["metadata"]["uid"])
    spec = place.spec()
    program(spec, "import time; time.sleep(600)")
    place.launcher(grace_seconds=1).launch(spec, spec.parent / "log", 1)
    until(lambda: len(api.list("Pod")["items"]) == 2)
    assert submit.submit(wanted, "", follow=True, cancel=True) == 0
    assert api.list("Pod")["items"] == [] and api.list("Job")["items"] == []


def test_the_command_says_what_it_wants():
    done = subprocess.run([sys.executable, "-m", "flows.cli", "submit"], capture_output=True, text=True)
    assert done.returncode == 2 and "add cluster=kubernetes, or use cuvee run" in done.stderr
