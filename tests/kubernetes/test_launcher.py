"""Stages as jobs of a cluster: started, watched, streamed, adopted, evicted, lost, cancelled, restarted."""

from __future__ import annotations

import json
import queue
import threading
import time

import psutil
import pytest

from flows.launchers import kubernetes
from flows.launchers._kubernetes_api import Refused
from stages.run import AGAIN, FAILED, OK, REFUSED
from stages.stage import ConfigError, CuveeError
from tests.kubernetes.conftest import until


class Running:
    """A job that is waited for in a thread."""

    def __init__(self, job):
        self.job, self.lines, self.status, self.error = job, [], None, None
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()

    def _wait(self):
        try:
            self.status = self.job.wait(self.lines.append)
        except CuveeError as error:
            self.error = error

    def said(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    def end(self, seconds: float = 120.0):
        self.thread.join(seconds)
        assert not self.thread.is_alive(), self.lines
        return self.status


def start(launcher, spec) -> Running:
    return Running(launcher.launch(spec, spec.parent / "log.txt", 1))


def launcher_name(spec) -> str:
    return kubernetes.title("a stage", spec.parent.name) + "-0"


def writes(place, plural="", method="POST"):
    return [json.loads(body) for verb, path, body in place.local.server.requests
            if verb == method and plural in path and body]  # fmt: skip


def test_the_lines_of_a_pod_and_its_status(place, program):
    spec = place.spec()
    program(spec, "print('step 1'); print('größer'); finish()")
    run = start(place.launcher(), spec)
    assert run.end() == OK
    assert [line for line in run.lines if not line.startswith("job ")] == ["step 1", "größer"]
    assert (spec.parent / "log.txt").read_text().splitlines() == run.lines


@pytest.mark.parametrize("code, restarts, status, pods", [(REFUSED, 3, REFUSED, 1), (FAILED, 3, FAILED, 1), (137, 1, -9, 2)])
def test_statuses_that_end_a_stage(place, program, code, restarts, status, pods):
    spec = place.spec()
    program(spec, f"open({str(spec.parent)!r} + '/tries', 'a').write('.'); finish(); raise SystemExit({code})")
    run = start(place.launcher(restarts=restarts), spec)
    assert run.end() == status
    assert len((spec.parent / "tries").read_text()) == pods
    assert run.said(f"ended with status {code}") and run.said("failed: ")


def test_killed_pods_and_those_that_ask_for_it_are_started_again(place, program):
    """Two deaths are as many as may count; asking to be started again does not."""
    spec = place.spec()
    program(spec, f"""
import os, sys
open({str(spec.parent / 'tries')!r}, 'a').write('.')
tries = os.path.getsize({str(spec.parent / 'tries')!r})
print('try', tries)
if tries < 6: sys.exit({AGAIN} if tries % 2 else 137)
finish()
""")
    run = start(place.launcher(restarts=2), spec)
    assert run.end() == OK
    assert [line for line in run.lines if line.startswith("try")] == [f"try {n}" for n in range(1, 7)]
    assert run.said("asks to be started again") and run.said("ended with status 137 (OOMKilled)" if place.local else "137")


def test_service_then_job_then_owner_and_every_field_is_checked(place, program):
    server = place.only_local().server
    spec = place.spec(processes=2)
    program(spec, "finish()")
    launcher = place.launcher()
    assert start(launcher, spec).end() == OK
    service, job = writes(place)
    assert (service["kind"], job["kind"]) == ("Service", "Job") and service["metadata"]["name"] == job["metadata"]["name"]
    (link,) = writes(place, "services", "PATCH")[0]["metadata"]["ownerReferences"]
    assert link["uid"] == launcher.api.get("Job", job["metadata"]["name"])["metadata"]["uid"]
    assert not [1 for verb, *_ in server.requests if verb == "DELETE"]
    launcher.api.delete("Job", job["metadata"]["name"])  # the job's end is the service's
    assert launcher.api.get("Service", service["metadata"]["name"]) is None


def test_an_existing_job_is_adopted_and_never_deleted(place, program):
    spec = place.spec()
    program(spec, f"import os, time\nwhile not os.path.exists({str(spec.parent / 'go')!r}): time.sleep(0.05)\nfinish()")
    first, second = (start(place.launcher(), spec) for _ in range(2))
    assert first.job.stage == second.job.stage and second.job.adopted
    other = spec.read_text()
    spec.write_text(other.replace('"threads": 1', '"threads": 2'))
    with pytest.raises(CuveeError, match="already makes this artifact, with another placement"):
        start(place.launcher(), spec)
    spec.write_text(other)
    (spec.parent / "go").touch()
    assert (first.end(), second.end()) == (OK, OK) and second.said("goes on")
    third = start(place.launcher(), spec)  # what is over is history
    assert third.job.stage.name.endswith("-1") and third.end() == OK


def test_what_a_run_that_died_did_not_own_ends_with_its_job_too(place, program):
    """It was killed between the job's creation and the service's change."""
    spec = place.spec(processes=2)
    program(spec, "finish()")
    launcher = place.launcher()
    stage = kubernetes.describe(launcher.cluster, spec, 1)
    assert launcher._create("Job", stage)
    assert not launcher.api.get("Service", stage.name)["metadata"].get("ownerReferences")
    run = start(place.launcher(), spec)
    assert run.job.adopted and run.end() == OK
    (link,) = launcher.api.get("Service", stage.name)["metadata"]["ownerReferences"]
    assert link["uid"] == launcher.api.get("Job", stage.name)["metadata"]["uid"]


def test_two_that_create_at_once_share_one_job(place, program, monkeypatch):
    spec = place.spec()
    program(spec, "finish()")
    first, late = place.launcher(), place.launcher()
    run = start(first, spec)
    asked = iter([None])  # what it saw before the other's creation
    monkeypatch.setattr(late, "_find", lambda *a: next(asked, None) or first._find(*a))
    assert start(late, spec).job.adopted and run.end() == OK


def test_every_line_comes_once_however_often_the_connection_breaks(place, program):
    server = place.only_local().server
    spec = place.spec()
    program(spec, "import time\nfor n in range(60): print('line', n); time.sleep(0.03)\nfinish()")
    run = start(place.launcher(), spec)
    for n in (5, 20, 40):
        until(lambda n=n: run.said(f"line {n}"))
        server.cuts += 1
    assert run.end() == OK
    assert [line for line in run.lines if line.startswith("line")] == [f"line {n}" for n in range(60)]


def test_a_watch_that_expired_and_a_server_that_is_away(place, program):
    server = place.only_local().server
    spec = place.spec()
    program(spec, f"import os, time\nprint('here')\nwhile not os.path.exists({str(spec.parent / 'go')!r}): time.sleep(0.05)\nfinish()")
    run = start(place.launcher(), spec)
    until(lambda: run.said("here"))
    server.objects.expire()
    until(lambda: sum("watch" not in path and verb == "GET" and "pods?" in path for verb, path, _ in server.requests) >= 2)
    server.broken.set()
    server.objects.expire()
    (spec.parent / "go").touch()
    until(lambda: run.said("unable to handle the request"))
    server.broken.clear()
    assert run.end() == OK


def test_cancelling_ends_every_pod(place, program):
    spec = place.spec(processes=2)
    program(spec, "import time; print('here'); time.sleep(600)")
    launcher = place.launcher(grace_seconds=1)
    run = start(launcher, spec)
    until(lambda: sum("here" in line for line in run.lines) == 2)
    processes = [p.pid for p in place.local.processes.values()] if place.local else []
    run.job.cancel()
    if place.local:  # options in the query would not count
        assert [body["propagationPolicy"] for body in writes(place, method="DELETE")] == ["Foreground"]
    assert run.end() < 0 and not any(map(psutil.pid_exists, processes))
    assert launcher.api.get("Job", run.job.stage.name) is None
    assert launcher.api.list("Pod", labelSelector=f"cuvee.dev/run={run.job.stage.name}")["items"] == []


def test_cancelling_ends_the_waiting_where_a_dead_node_keeps_its_pod(place, program, monkeypatch):
    cluster, real = place.only_local(), kubernetes.end
    spec = place.spec()
    program(spec, "import time; print('here'); time.sleep(600)")
    run = start(place.launcher(), spec)
    until(lambda: run.said("here"))
    cluster.lose(cluster.objects.all("pods")[0]["spec"]["nodeName"])
    monkeypatch.setattr(kubernetes, "end", lambda *arguments: real(*arguments[:-1], 0.5))
    with pytest.raises(CuveeError, match="not gone after 0 s: .* keeps its pods until somebody confirms"):
        run.job.cancel()
    assert run.end() < 0


def test_a_chatty_pod_hides_no_other_that_cannot_start(place):
    class Stuck:
        def look(self):
            return "pod b can't start: ErrImagePull"

    job = kubernetes.Job(None, None, "Job", kubernetes.Stage("a", "", "", 1), adopted=False)
    job.cancel = lambda: None
    lines = queue.SimpleQueue()
    for _ in range(10):
        lines.put(("line", "waiting for the first host"))
    with pytest.raises(CuveeError, match="pod b can't start: ErrImagePull; job a was ended"):
        job._until_over(lines, Stuck(), print)


def test_a_job_that_somebody_deletes_is_no_death(place, program):
    spec = place.spec()
    program(spec, "import time; print('here'); time.sleep(600)")
    launcher = place.launcher(grace_seconds=1)
    run = start(launcher, spec)
    until(lambda: run.said("here"))
    launcher.api.delete("Job", run.job.stage.name, "Foreground")
    run.end()
    assert "was deleted in the cluster; run again" in str(run.error)


def test_an_evicted_pod_is_replaced_and_does_not_count(place, program):
    spec = place.spec()
    program(spec, f"""
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print('saving'), sys.exit(1)))
if os.path.exists({str(spec.parent / 'once')!r}): print('again'); finish(); sys.exit(0)
open({str(spec.parent / 'once')!r}, 'w'); print('here'); time.sleep(600)
""")
    launcher = place.launcher(restarts=0)
    run = start(launcher, spec)
    until(lambda: run.said("here"))
    (pod,) = launcher.api.list("Pod", labelSelector=f"cuvee.dev/run={run.job.stage.name}")["items"]
    place.evict(pod["metadata"]["name"])
    assert run.end() == OK
    assert run.said("saving") and run.said("again") and run.said("evicted (EvictionByEvictionAPI)")


@pytest.mark.parametrize("confirmed", ["removed", "out of service", "silent"])
def test_a_lost_node_is_waited_for_until_it_is_dead_for_certain(place, program, monkeypatch, confirmed):
    from flows.launchers import _kubernetes_pods

    monkeypatch.setattr(_kubernetes_pods, "LOOK_SECONDS", 0.2)
    cluster = place.only_local()
    spec = place.spec()
    once = str(spec.parent / "once")
    program(spec, f"import os, time\nif not os.path.exists({once!r}): open({once!r}, 'w'); print('here'); time.sleep(600)\nfinish()")
    run = start(place.launcher(restarts=0, dead_node_seconds=2 if confirmed == "silent" else 0), spec)
    until(lambda: run.said("here"))
    (pod,) = cluster.objects.all("pods")
    node = pod["spec"]["nodeName"]
    cluster.lose(node)
    if confirmed != "silent":
        until(lambda: run.said(f"node {node} does not answer"))
        assert len(cluster.objects.all("pods")) == 1  # nothing was started beside what may still write
    if confirmed == "removed":
        cluster.objects.remove("nodes", node)
    elif confirmed == "out of service":
        taint = {"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute"}
        cluster.objects.update("nodes", node, lambda it: it["spec"].update(taints=[taint]))
    assert run.end() == OK and run.said("a new pod takes its place")


def test_without_the_right_to_look_after_lost_pods_it_says_so(place, program, monkeypatch):
    from flows.launchers import _kubernetes_pods

    monkeypatch.setattr(_kubernetes_pods, "LOOK_SECONDS", 0.2)
    cluster = place.only_local()
    cluster.server.rights.remove(("", "nodes", "get"))  # as without infra/kubernetes/components/node-loss
    spec = place.spec()
    program(spec, "import time; print('here'); time.sleep(600)")
    run = start(place.launcher(), spec)
    until(lambda: run.said("here"))
    cluster.lose(cluster.objects.all("pods")[0]["spec"]["nodeName"])
    until(lambda: run.said("could not be looked after (nodes is forbidden"))


def test_a_pod_that_cannot_start_ends_the_stage_with_its_reason(place, monkeypatch):
    from flows.launchers import _kubernetes_pods

    monkeypatch.setattr(_kubernetes_pods, "LOOK_SECONDS", 0.2)
    launcher = place.launcher(data_image="missing.invalid/nothing:1", start_seconds=1)
    run = start(launcher, place.spec())
    run.end()
    assert "can't start: " in str(run.error) and "missing.invalid/nothing:1" in str(run.error)
    assert launcher.api.get("Job", run.job.stage.name) is None


def test_a_job_that_waits_in_its_queue_says_so(place, program, monkeypatch):
    """As Kueue does: suspended when it is created, admitted when there is room."""
    cluster = place.only_local()
    spec = place.spec()
    program(spec, "finish()")
    real = kubernetes.manifests.render
    monkeypatch.setattr(kubernetes.manifests, "render", lambda *a: [kubernetes.manifests.merge(m, {"spec": {"suspend": True}})
                                                                    for m in real(*a)])  # fmt: skip
    run = start(place.launcher(queue="training"), spec)
    until(lambda: run.said("waits in its queue"))
    name = run.job.stage.name
    assert cluster.objects.get("jobs", name)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    cluster.objects.update("jobs", name, lambda job: job["spec"].update(suspend=False))
    assert run.end() == OK and run.said("was admitted")


@pytest.mark.parametrize("kind, over", [("Complete", True), ("Completed", True), ("Failed", False), ("Suspended", None)])
def test_the_three_kinds_end_under_different_names(kind, over):
    found = {"status": {"conditions": [{"type": kind, "status": "True"}, {"type": "Failed", "status": "False"}]}}
    assert kubernetes.outcome(found) is over and kubernetes.outcome({}) is None


def test_refusals_are_one_sentence_and_leave_nothing(place, tmp_path):
    spec = place.spec(processes=2)
    with pytest.raises(Refused, match="POST jobs: .*nodeSelectr|Additional properties"):
        start(place.launcher(pod={"nodeSelectr": {"pool": "h100"}}), spec)
    launcher = place.launcher()
    assert launcher.api.get("Service", launcher_name(spec)) is None
    if place.local:  # a real cluster may know JobSets
        with pytest.raises(CuveeError, match="could not find the requested resource"):
            start(place.launcher(kind="jobset"), spec)
    with pytest.raises(ConfigError, match="no folder that can be written here; mount the volume"):
        place.launcher(volume={"claim": "cuvee", "path": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match="cluster.data_image is empty"):
        place.launcher(data_image="")
    with pytest.raises(ConfigError, match="cluster.knd: 'knd' is not known; did you mean 'kind'"):
        place.launcher(knd="job")
    outside = tmp_path / "spec.json"
    outside.write_text(spec.read_text())
    with pytest.raises(ConfigError, match="not on the volume that the pods share"):
        start(launcher, outside)


def test_a_cluster_that_does_not_answer_or_knows_us_not(place, monkeypatch, tmp_path):
    place.only_local()
    text = (tmp_path / "kubeconfig").read_text()
    (tmp_path / "kubeconfig").write_text(text.replace("tests-only", "stolen"))
    with pytest.raises(CuveeError, match="Unauthorized; log in to the cluster again"):
        place.launcher().warm()
    (tmp_path / "kubeconfig").write_text(text.replace(place.local.server.url, "http://127.0.0.1:9"))
    with pytest.raises(CuveeError, match="does not answer"):
        place.launcher().warm()
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no Kubernetes cluster is configured here"):
        place.launcher()


def test_a_name_fits_what_is_made_from_it():
    name = kubernetes.title("Ein sehr langer Name, länger als erlaubt!", "0123456789abcdef" * 2)
    assert name == "cuvee-ein-sehr-langer-name-l-n-0123456789ab" and len(f"{name}-10-node-0-511") <= 63


def test_time_passes_only_while_it_is_true(monkeypatch):
    from flows.launchers._kubernetes_watch import Patience

    at = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: at[0])
    patience = Patience(10)
    assert not patience.over("a", True)
    at[0] = 9
    assert not patience.over("a", False)
    at[0] = 12
    assert not patience.over("a", True)
    at[0] = 22
    assert patience.over("a", True)
