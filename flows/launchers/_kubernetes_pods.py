"""The pods of a stage: their logs, what befalls them, and the status that they leave."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from flows.launchers._kubernetes_api import NOT_FOUND, Api, Refused, Unreachable, patiently
from flows.launchers._kubernetes_manifests import INDEX, LABEL, Settings, Stage
from flows.launchers._kubernetes_watch import Patience, follow_log
from stages.launch import BY_SIGNAL, LOST
from stages.run import AGAIN, FAILED, OK, REFUSED

STUCK = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError",
         "CreateContainerError", "RunContainerError")  # fmt: skip
LOOK_SECONDS = 5.0
DRAIN_SECONDS = 20.0
TERMINATED = BY_SIGNAL + signal.SIGTERM
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"


class Pods:
    """Follows a stage's pods; what they say and do comes through `happened` as ("line", text)."""

    def __init__(self, api: Api, settings: Settings, stage: Stage, happened: queue.SimpleQueue):
        self.api, self.settings, self.stage, self.happened = api, settings, stage, happened
        self.pods: dict[str, dict[str, Any]] = {}
        self.codes: dict[str, int] = {}
        self._said: dict[str, str] = {}
        self._readers: dict[str, threading.Thread] = {}  # by pod
        self._last_readers: dict[str, threading.Thread] = {}  # by rank of the pod
        self._over = threading.Event()
        self._stuck, self._looked = Patience(settings.start_seconds), 0.0

    def changed(self, name: str, pod: dict[str, Any] | None) -> None:
        """Take note of a pod as it is now, or that it is gone."""
        if pod is None:
            self.pods.pop(name, None)
            return
        self.pods[name] = pod
        container = state(pod)
        if "terminated" in container:
            self.codes[name] = container["terminated"]["exitCode"]
        if (text := befell(pod)) != self._said.get(name, ""):
            self._said[name] = text
            if text:
                self.happened.put(("line", f"pod {name}: {text}"))
        if name not in self._readers and container.keys() & {"running", "terminated"}:
            index = (pod["metadata"].get("annotations") or {}).get(INDEX, "0")
            reader = threading.Thread(target=self._read, args=(name, index, self._last_readers.get(index)), daemon=True)
            self._readers[name] = self._last_readers[index] = reader
            reader.start()

    def _read(self, name: str, index: str, before: threading.Thread | None) -> None:
        """Pass on a pod's log; one that takes another's place is heard when that one has said all, or after a while."""
        if before:
            before.join(DRAIN_SECONDS / 2)
        prefix = "" if index == "0" else f"[{index}] "
        follow_log(self.api, name, lambda: self._ended(name), lambda line: self.happened.put(("line", prefix + line)), self._over)

    def _ended(self, name: str) -> bool:
        return name not in self.pods or self.pods[name].get("status", {}).get("phase") in ("Succeeded", "Failed")

    def look(self) -> str:
        """From time to time: pods that can't start (says why, once the patience is over) and pods of dead nodes."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return ""
        self._looked = time.monotonic()
        for name, pod in list(self.pods.items()):
            waiting = state(pod).get("waiting", {})
            if self._stuck.over(name, waiting.get("reason") in STUCK):
                return f"pod {name} can't start: {waiting['reason']}: {waiting.get('message', '')}"
            if overdue(pod):
                self._free(name, pod)
        return ""

    def _free(self, name: str, pod: dict[str, Any]) -> None:
        """A pod that should have ended long ago: where its node is dead for certain, say that the pod has failed.

        Nobody else does, and the job waits for it. A node that is only silent may still run it, and two would write.
        """
        node = pod["spec"].get("nodeName", "")
        try:
            dead = why_dead(self.api.get("Node", node), self.settings.dead_node_seconds)
            if dead:
                status = {"phase": "Failed", "reason": "NodeLost", "message": f"node {node} {dead}"}
                self.api.patch("Pod", name, {"status": status}, "status")
                self._say(name, f"node {node} {dead}; a new pod takes its place")
            else:
                self._say(name, f"should have ended, but node {node} does not answer; when it is certain that it is dead: "
                                f"kubectl taint nodes {node} {OUT_OF_SERVICE}=lost:NoExecute, or delete the node")
        except Refused as error:
            if error.status != NOT_FOUND:  # it has gone by itself
                self._say(name, f"should have ended, but could not be looked after ({error.reason})")
        except Unreachable:
            pass

    def _say(self, name: str, text: str) -> None:
        if self._said.get(f"{name}/node") != text:
            self._said[f"{name}/node"] = text
            self.happened.put(("line", f"pod {name}: {text}"))

    def rest(self, seconds: float = DRAIN_SECONDS) -> Iterator[str]:
        """The lines that are still to come when the job is over, within so many seconds."""
        selector = f"{LABEL}={self.stage.name}"
        for pod in patiently(lambda: self.api.list("Pod", labelSelector=selector), print)["items"]:
            self.changed(pod["metadata"]["name"], pod)  # the job's end may be known before that of its last pod
        deadline = time.monotonic() + seconds
        for reader in self._readers.values():
            reader.join(max(0.0, deadline - time.monotonic()))
        self._over.set()
        while not self.happened.empty():
            what, value = self.happened.get()
            if what == "line":
                yield value

    def status(self) -> int:
        """The exit status that explains a failed job: a refusal, else what is not the consequence of another's. Negative
        for a signal: the stage may be started again if it got on."""
        codes = [code for code in self.codes.values() if code not in (OK, AGAIN)]
        if REFUSED in codes:
            return REFUSED
        causes = [code for code in codes if code not in (LOST, TERMINATED)] or codes
        status = max(causes, default=FAILED)
        return BY_SIGNAL - status if status > BY_SIGNAL else -signal.SIGTERM if status == LOST else status


def state(pod: dict[str, Any]) -> dict[str, Any]:
    """{"waiting"}, {"running"} or {"terminated"} of the pod's container; empty before it has any."""
    statuses = pod.get("status", {}).get("containerStatuses") or []
    return statuses[0].get("state", {}) if statuses else {}


def befell(pod: dict[str, Any]) -> str:
    """What is worth telling of a pod now; empty while all is as it should be."""
    conditions = {c["type"]: c for c in pod.get("status", {}).get("conditions") or []}
    container = state(pod)
    if (ended := container.get("terminated")) and ended["exitCode"]:
        reason = "asks to be started again" if ended["exitCode"] == AGAIN else ended.get("reason", "")
        return f"ended with status {ended['exitCode']} ({reason})"
    if (evicted := conditions.get("DisruptionTarget", {})).get("status") == "True":
        return f"is evicted ({evicted.get('reason', '')}); a new pod takes its place"
    if (waiting := container.get("waiting", {})).get("reason") in STUCK:
        return f"can't start: {waiting['reason']}: {waiting.get('message', '')}"
    if (placed := conditions.get("PodScheduled", {})).get("status") == "False":
        return f"waits for a node: {placed.get('message', '')}"
    return ""


def overdue(pod: dict[str, Any]) -> bool:
    """Whether a pod is past the end that it was given (deletionTimestamp, at the end of its grace) and has not ended."""
    due = pod["metadata"].get("deletionTimestamp")
    if not due or pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        return False
    return datetime.now(UTC).timestamp() > _seconds(due) + LOOK_SECONDS


def why_dead(node: dict[str, Any] | None, silence: int) -> str:
    """Why a node is dead for certain; empty where it may be alive. silence: seconds that count as death, 0 for none."""
    if node is None:
        return "was removed from the cluster"
    if any(taint["key"] == OUT_OF_SERVICE for taint in node["spec"].get("taints") or []):
        return "was taken out of service"
    for condition in node.get("status", {}).get("conditions") or []:
        if condition["type"] == "Ready" and condition["status"] == "Unknown" and silence:
            silent = datetime.now(UTC).timestamp() - _seconds(condition["lastTransitionTime"])
            if silent >= silence:
                return f"is silent for {silent:.0f} s"
    return ""


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
