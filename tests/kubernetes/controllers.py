"""What acts on the test server's objects: the Job controller, a scheduler, and kubelets that run pods as local processes.

As in Kubernetes: a pod of an Indexed Job is replaced once it has failed for good (podReplacementPolicy Failed), failures
are judged by podFailurePolicy, others count against backoffLimit; a pod of a node that is lost stays Terminating until
somebody says that it has failed. Unlike there, pods share the host's network and files: names resolve to loopback.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

from tests.kubernetes.apiserver import Server, now, set_condition

TICK = 0.05
INDEX = "batch.kubernetes.io/job-completion-index"


class Log:
    """A container's output, each line with its time."""

    def __init__(self):
        self.changed, self.lines, self.over, self.lost = threading.Condition(), [], False, False

    def read(self, pipe) -> None:
        for line in pipe:
            with self.changed:
                stamp = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "000Z")
                self.lines.append((stamp, line.rstrip("\n")))
                self.changed.notify_all()
        with self.changed:
            self.over = True
            self.changed.notify_all()


class Cluster:
    """Nodes `node-0`, `node-1`, ... with the server; `lose` takes one away."""

    def __init__(self, rights: set[tuple[str, str, str]], nodes: int = 2, tolerate: float = 0.5):
        self.server, self.tolerate = Server(rights), tolerate
        self.objects = self.server.objects
        self.processes: dict[str, subprocess.Popen] = {}  # pod -> its container
        self.killed: dict[str, float] = {}  # pod -> when it was asked to end
        self.lost: dict[str, float] = {}  # node -> since when
        self.counted: set[str] = set()  # uids of failed pods that the controller has dealt with
        self.failures: dict[str, int] = {}
        self.number, self.stop = 0, threading.Event()
        self.variables: dict[str, str] = {}  # that every container gets, as the way to the cluster's API is
        for index in range(nodes):
            node = {"metadata": {"name": f"node-{index}"}, "spec": {}, "status": {}}
            set_condition(node, "Ready", "True")
            self.objects.create("nodes", node)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.stop.set()
        self.thread.join()
        for process in self.processes.values():
            kill(process, signal.SIGKILL)
        self.server.close()

    def lose(self, node: str) -> None:
        """The machine goes dark: its processes end, and nobody can say so."""
        self.lost[node] = time.monotonic()
        for pod in self.objects.all("pods"):
            name = pod["metadata"]["name"]
            if pod["spec"].get("nodeName") == node and name in self.processes:
                kill(self.processes.pop(name), signal.SIGKILL)
                self.server.logs[name].lost = True
        self.objects.update("nodes", node, lambda it: set_condition(it, "Ready", "Unknown", "NodeStatusUnknown"))

    def _run(self) -> None:
        while not self.stop.wait(TICK):
            with self.objects.changed:
                for job in self.objects.all("jobs"):
                    self._job(job)
                for pod in self.objects.all("pods"):
                    self._pod(pod)
                self.objects.collect()

    # The Job controller.

    def _job(self, job: dict) -> None:
        name, spec = job["metadata"]["name"], job["spec"]
        if "deletionTimestamp" in job["metadata"] or any(c["type"] in ("Complete", "Failed") for c in
                                                         job["status"].get("conditions", [])):  # fmt: skip
            return
        pods = [item for plural, item in self.objects.owned(job) if plural == "pods"]
        phases: dict[int, set[str]] = {index: set() for index in range(spec["completions"])}
        for pod in pods:
            phases[int(pod["metadata"]["annotations"][INDEX])].add(pod["status"].get("phase", "Pending"))
            if pod["status"].get("phase") == "Failed" and pod["metadata"]["uid"] not in self.counted:
                self.counted.add(pod["metadata"]["uid"])
                action = judge(spec.get("podFailurePolicy", {}).get("rules", []), pod)
                if action == "FailJob":
                    return self._fail(job, pods, "PodFailurePolicy", f"Container node for pod {pod['metadata']['name']} failed")
                if action == "Count":
                    self.failures[name] = self.failures.get(name, 0) + 1
        if self.failures.get(name, 0) > spec.get("backoffLimit", 6):
            return self._fail(job, pods, "BackoffLimitExceeded", "Job has reached the specified backoff limit")
        if all("Succeeded" in seen for seen in phases.values()):
            self.objects.update("jobs", name, lambda it: set_condition(it, "Complete", "True", "CompletionsReached"))
        for index, seen in phases.items():
            if not seen & {"Pending", "Running", "Succeeded"} and not spec.get("suspend"):
                self._create_pod(job, index)

    def _fail(self, job: dict, pods: list[dict], reason: str, message: str) -> None:
        active = [pod for pod in pods if pod["status"].get("phase", "Pending") in ("Pending", "Running")]
        for pod in active:
            self.objects.delete("pods", pod["metadata"]["name"], {})
        self.objects.update("jobs", job["metadata"]["name"], lambda it: set_condition(it, "Failed", "True", reason, message))

    def _create_pod(self, job: dict, index: int) -> None:
        self.number += 1
        name, template = job["metadata"]["name"], job["spec"]["template"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job["metadata"]["uid"]}
        self.objects.create("pods", {
            "metadata": {"name": f"{name}-{index}-{self.number:05d}", "ownerReferences": [owner],
                         "annotations": {INDEX: str(index)},
                         "labels": {**template["metadata"]["labels"], "batch.kubernetes.io/job-name": name,
                                    "batch.kubernetes.io/controller-uid": job["metadata"]["uid"]}},
            "spec": {**template["spec"], "hostname": f"{name}-{index}"}, "status": {"phase": "Pending"}})  # fmt: skip

    # The scheduler and the kubelets.

    def _pod(self, pod: dict) -> None:
        name, node = pod["metadata"]["name"], pod["spec"].get("nodeName")
        leaving = "deletionTimestamp" in pod["metadata"]
        if node is None:
            return self._schedule(pod)
        if node in self.lost:
            if not leaving and time.monotonic() - self.lost[node] > self.tolerate:
                self.objects.update("pods", name, lambda it: set_condition(it, "DisruptionTarget", "True", "DeletionByTaintManager"))
                self.objects.update("pods", name, lambda it: it["metadata"].update(deletionTimestamp=now()))
            return
        process = self.processes.get(name)
        if process is None:
            return self.objects.remove("pods", name) if leaving else None
        if process.poll() is not None and self.server.logs[name].over:
            del self.processes[name]
            kill(process, signal.SIGKILL)  # what it left behind ends with the container
            self.objects.update("pods", name, lambda it: ended(it, process.returncode))
        elif leaving:
            if name not in self.killed:
                self.killed[name] = time.monotonic()
                process.send_signal(signal.SIGTERM)  # to the container's first process, as a kubelet does
            elif time.monotonic() - self.killed[name] > pod["spec"].get("terminationGracePeriodSeconds", 30):
                kill(process, signal.SIGKILL)

    def _schedule(self, pod: dict) -> None:
        alive = [node["metadata"]["name"] for node in self.objects.all("nodes") if node["metadata"]["name"] not in self.lost]
        name, container = pod["metadata"]["name"], pod["spec"]["containers"][0]
        selector = pod["spec"].get("nodeSelector")
        if not alive or selector:
            return self.objects.update("pods", name, lambda it: set_condition(
                it, "PodScheduled", "False", "Unschedulable", f"0/{len(alive)} nodes are available"))  # fmt: skip
        if container["image"].startswith("missing"):
            waiting = {"waiting": {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{container["image"]}"'}}
            return self.objects.update("pods", name, lambda it: it["status"].update(
                containerStatuses=[{"name": "node", "state": waiting}]))  # fmt: skip
        node = alive[self.number % len(alive)] if len(alive) > 1 else alive[0]
        self._start(name, pod, container)
        self.objects.update("pods", name, lambda it: running(it, node))

    def _start(self, name: str, pod: dict, container: dict) -> None:
        values = {}
        for variable in container.get("env", []):
            values[variable["name"]] = self._value(pod, variable)
        values["JOB_COMPLETION_INDEX"] = pod["metadata"]["annotations"][INDEX]
        path = os.path.dirname(sys.executable) + ":" + os.environ["PATH"]  # `python` in the image
        # As unprivileged as a container: of the test's own environment it gets nothing but where Cuvee lies.
        environment = {"PATH": path, "PYTHONPATH": os.getcwd(), "HOME": "/tmp", "OMP_WAIT_POLICY": "PASSIVE",
                       **self.variables, **values}  # fmt: skip
        process = subprocess.Popen(container["command"] + container.get("args", []), env=environment, text=True,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   start_new_session=True, errors="replace")  # fmt: skip
        log = self.server.logs[name] = Log()
        self.processes[name] = process
        threading.Thread(target=log.read, args=(process.stdout,), daemon=True).start()

    @staticmethod
    def _value(pod: dict, variable: dict) -> str:
        if "value" not in variable:
            path = variable["valueFrom"]["fieldRef"]["fieldPath"]
            if path == "status.podIP":
                return "127.0.0.1"
            return pod["metadata"]["labels"][re.fullmatch(r"metadata\.labels\['(.+)'\]", path)[1]]
        subdomain = re.escape(pod["spec"].get("subdomain", "-"))
        return re.sub(rf"[\w-]+\.{subdomain}(?=:)", "127.0.0.1", variable["value"].replace("$$", "$"))


def judge(rules: list[dict], pod: dict) -> str:
    """The action of the first rule that a failed pod matches, or "Count"."""
    code = pod["status"].get("containerStatuses", [{}])[0].get("state", {}).get("terminated", {}).get("exitCode", 0)
    conditions = {(c["type"], c["status"]) for c in pod["status"].get("conditions", [])}
    for rule in rules:
        if any((one["type"], one["status"]) in conditions for one in rule.get("onPodConditions", [])):
            return rule["action"]
        if "onExitCodes" in rule and code and code in rule["onExitCodes"]["values"]:
            return rule["action"]
    return "Count"


def running(pod: dict, node: str) -> None:
    pod["spec"]["nodeName"] = node
    set_condition(pod, "PodScheduled", "True")
    pod["status"] |= {"phase": "Running", "podIP": "127.0.0.1",
                      "containerStatuses": [{"name": "node", "state": {"running": {"startedAt": now()}}}]}  # fmt: skip


def ended(pod: dict, status: int) -> None:
    code = 128 - status if status < 0 else status
    reason = {0: "Completed", 137: "OOMKilled"}.get(code, "Error")
    pod["status"] |= {"phase": "Failed" if code else "Succeeded", "containerStatuses": [
        {"name": "node", "state": {"terminated": {"exitCode": code, "reason": reason}}}]}  # fmt: skip


def kill(process: subprocess.Popen, how: int) -> None:
    """A container's processes end with it, also those in groups of their own."""
    import psutil

    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    for one in [*tree, process]:
        try:
            os.kill(one.pid, how)
        except ProcessLookupError:
            pass
