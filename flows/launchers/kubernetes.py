"""Run stages as jobs of a Kubernetes cluster: an Indexed Job (several hosts: with a headless Service), a JobSet or a TrainJob.

A stage's pods and the run share one volume, mounted at the same path (cluster.volume): spec, work in progress, checkpoints
and the finished files lie there, so that whichever pod goes on finds them, and the run publishes what they leave.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flows.launchers import _kubernetes_manifests as manifests
from flows.launchers._kubernetes_api import CONFLICT, Api, Refused, Unreachable, patiently
from flows.launchers._kubernetes_manifests import LABEL, SPEC, Settings, Stage
from flows.launchers._kubernetes_pods import Pods
from flows.launchers._kubernetes_watch import follow
from stages.run import AGAIN, FAILED, OK, REFUSED
from stages.stage import ConfigError, CuveeError, parse

COMMON = ("name", "launcher", "device", "cores", "devices", "hosts", "memory_gib", "flops_per_second", "price_per_hour",
          "currency", "concurrent_stages")  # fmt: skip
KINDS = {"job": "Job", "jobset": "JobSet", "trainjob": "TrainJob"}
OVER = {"Complete": True, "Completed": True, "Failed": False}  # condition types of the three kinds
SEEN_SECONDS = 90.0  # that a network file system may take to show another host's new file
CANCELLED = -15


class Launcher:
    """Raises ConfigError where the settings can't be right or the volume is not mounted here."""

    REMOTE = True

    def __init__(self, cluster: Any) -> None:
        self.cluster, self.settings = cluster, settings(cluster)
        self.volume = Path(self.settings.volume.path)
        if not os.access(self.volume, os.W_OK):
            raise ConfigError(
                f"cluster.volume.path={self.volume} is no folder that can be written here; mount the volume of claim "
                f"{self.settings.volume.claim!r} there, or start the run in the cluster: cuvee submit"
            )
        self.api = Api(self.settings.context, self.settings.namespace)
        self.flow = (os.environ.get("CUVEE_FLOW_JOB", ""), os.environ.get("CUVEE_FLOW_UID", ""))

    def warm(self) -> None:
        """Ask for the jobs now: who may not is told before the first stage."""
        self.api.list("Job", labelSelector=f"{LABEL}=none")

    def launch(self, spec: Path, log: Path, threads: int) -> Job:
        """Create the stage's job, or adopt the one that already runs. Raises CuveeError where the cluster refuses."""
        stage = describe(self.cluster, spec, threads, self.flow[0])
        self._check_paths(spec)
        kind = KINDS[manifests.kind(self.settings, stage)]
        name, found = attempt(lambda name: self._find(kind, name), stage.name)
        stage = replace(stage, name=name)
        made = None if found else self._create(kind, stage)
        owner = made or found or self._find(kind, name) or {"metadata": {}}
        if (owner["metadata"].get("annotations") or {}).get(SPEC) != stage.digest:
            raise CuveeError(
                f"{kind.lower()} {name} of namespace {self.api.namespace} already makes this artifact, with another "
                f"placement; wait for it, or end it: kubectl delete {kind.lower()} {name}"
            )
        self._own(kind, stage, owner["metadata"]["uid"])
        result = Path(json.loads(spec.read_text())["result"])
        return Job(self.api, self.settings, kind, stage, adopted=made is None, log=log, result=result)

    def _find(self, kind: str, name: str) -> dict[str, Any] | None:
        return patiently(lambda: self.api.get(kind, name), print)

    def _create(self, kind: str, stage: Stage) -> dict[str, Any] | None:
        """What runs the stage; None where that was there already: another run was faster, or an answer was lost."""
        *parts, owner = manifests.render(self.settings, stage)
        if all(self.flow):  # ended with the run that it is part of
            owner["metadata"]["ownerReferences"] = [reference("batch/v1", "Job", *self.flow)]
        mine = [part for part in parts if create(self.api, part)]
        try:
            return create(self.api, owner)
        except CuveeError:
            for part in mine:  # nobody would ever remove it
                self.api.delete(part["kind"], stage.name)
            raise

    def _own(self, kind: str, stage: Stage, uid: str) -> None:
        """Whatever else the stage has ends with what runs it, also where the run that created it died before it said so."""
        *parts, owner = manifests.render(self.settings, stage)
        change = {"metadata": {"ownerReferences": [reference(owner["apiVersion"], kind, stage.name, uid)]}}
        for part in parts:
            patiently(lambda kind=part["kind"]: self.api.patch(kind, stage.name, change), print)

    def _check_paths(self, spec: Path) -> None:
        wanted = json.loads(spec.read_text())
        for path in [spec, *(Path(p) for p in paths(wanted["inputs"]))]:
            if not path.resolve().is_relative_to(self.volume.resolve()):
                raise ConfigError(
                    f"{path} is not on the volume that the pods share; set store=s3, or store.uri to a folder below "
                    f"cluster.volume.path={self.volume}"
                )

    def close(self) -> None:
        """Nothing runs here."""


class Job:
    """One attempt at a stage. `wait` returns its exit status, as those of the other launchers do.

    adopted: whether it was there before. log: where its lines are written too. result: what it leaves on the volume.
    """

    def __init__(
        self, api: Api, settings: Settings, kind: str, stage: Stage, adopted: bool, log: Path | None = None,
        result: Path | None = None,
    ):  # fmt: skip
        self.api, self.settings, self.kind, self.stage = api, settings, kind, stage
        self.adopted, self.log, self.result = adopted, log, result
        self.cancelled, self.over = threading.Event(), threading.Event()

    def wait(self, on_line: Callable[[str], None]) -> int:
        """Pass on every line of the pods' logs, and what befalls them, until the job ends.

        Raises CuveeError where somebody deleted the job, or its pods can't be started.
        """
        happened: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        pods = Pods(self.api, self.settings, self.stage, happened)
        watches = (("Pod", {"labelSelector": f"{LABEL}={self.stage.name}"}, pods.changed),
                   (self.kind, {"fieldSelector": f"metadata.name={self.stage.name}"},
                    lambda _, owner: happened.put(("owner", owner))))  # fmt: skip
        for watch in watches:
            threading.Thread(target=self._follow, args=(*watch, happened), daemon=True).start()
        try:
            with open(self.log or os.devnull, "a") as file:
                def tell(line: str) -> None:
                    file.write(line + "\n")
                    file.flush()
                    on_line(line)

                doing = "goes on" if self.adopted else "was created"
                tell(f"{self.kind.lower()} {self.stage.name} in namespace {self.api.namespace} {doing}")
                owner = self._until_over(happened, pods, tell)
                for line in pods.rest(1.0) if self.cancelled.is_set() else pods.rest():
                    tell(line)
                return self._status(owner, pods, tell)
        finally:
            self.over.set()

    def _follow(self, kind: str, selectors: dict[str, str], changed: Any, happened: queue.SimpleQueue) -> None:
        try:
            follow(self.api, kind, selectors, changed, self.over, lambda text: happened.put(("line", text)))
        except Exception as error:  # a thread's error is nobody's: the one that waits must have it
            happened.put(("error", error))

    def _until_over(self, happened: queue.SimpleQueue, pods: Pods, tell: Callable[[str], None]) -> dict[str, Any] | None:
        """The finished owner; None where it was deleted, or nobody waits for it any more."""
        seen, suspended = False, False
        while not self.over.is_set():
            if why := pods.look():
                self.cancel()
                raise CuveeError(f"{why}; job {self.stage.name} was ended")
            try:
                what, value = happened.get(timeout=1.0)
            except queue.Empty:
                continue
            if what == "error":
                raise value
            if what == "line":
                tell(value)
            elif what == "owner":
                if value is None and seen:
                    return None
                if value is not None:
                    seen = True
                    if outcome(value) is not None:
                        return value
                    if suspended != (suspended := bool(value["spec"].get("suspend"))):
                        tell(f"{self.stage.name} {'waits in its queue' if suspended else 'was admitted'}")
        return None

    def _status(self, owner: dict[str, Any] | None, pods: Pods, tell: Callable[[str], None]) -> int:
        if owner is None:
            if self.cancelled.is_set():
                return CANCELLED
            raise CuveeError(f"{self.kind.lower()} {self.stage.name} was deleted in the cluster; run again to go on from "
                             "its last checkpoint")
        status = OK
        if not outcome(owner):
            status = pods.status()
            why = next(c for c in owner["status"]["conditions"] if c["type"] == "Failed" and c["status"] == "True")
            tell(f"{self.stage.name} failed: {why.get('reason', '')}: {why.get('message', '')}")
        deadline = time.monotonic() + SEEN_SECONDS
        while self.result and status in (OK, REFUSED) and not self._answered():
            if time.monotonic() > deadline:  # this run has removed what it adopted too late
                return AGAIN if status == OK else FAILED
            time.sleep(0.2)
        return status

    def _answered(self) -> bool:
        return self.result.name in os.listdir(self.result.parent)  # listing asks the server where a look-up may not

    def cancel(self) -> None:
        """End the job, and return when none of its pods is left. Raises CuveeError where some stay."""
        self.cancelled.set()
        try:
            end(self.api, self.kind, self.stage.name, f"{LABEL}={self.stage.name}", self.settings.grace_seconds + 60.0)
        finally:
            self.over.set()


def create(api: Api, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The object as it was created; None where the name is taken: by another run, or by this one, whose answer was lost."""
    try:
        return patiently(lambda: api.create(manifest), print)
    except Refused as error:
        if error.status == CONFLICT:
            return None
        raise


def attempt(find: Callable[[str], dict[str, Any] | None], name: str) -> tuple[str, dict[str, Any] | None]:
    """(the name to create under, None), or (the name of a job that goes on, that job). `name` ends with a number; jobs that
    are over keep theirs."""
    base, _, number = name.rpartition("-")
    told = False
    while (found := find(f"{base}-{number}")) is not None:
        if found["metadata"].get("deletionTimestamp"):  # its pods may still write
            if not told:
                print(f"{base}-{number} is being deleted; waiting until its pods are gone")
            told = True
            time.sleep(0.5)
        elif outcome(found) is None:
            break
        else:
            number = int(number) + 1
    return f"{base}-{number}", found


def end(api: Api, kind: str, name: str, selector: str, seconds: float) -> None:
    """Delete an object with all that it owns; returns when it and every pod that `selector` names are gone."""
    deadline = time.monotonic() + seconds
    patiently(lambda: api.delete(kind, name, "Foreground"), print)
    while True:
        left = [pod["metadata"]["name"] for pod in patiently(lambda: api.list("Pod", labelSelector=selector), print)["items"]]
        if not left and patiently(lambda: api.get(kind, name), print) is None:
            return
        if time.monotonic() > deadline:
            raise CuveeError(f"{kind.lower()} {name} is deleted, but not gone after {seconds:.0f} s: {', '.join(left)}; a "
                             "node that does not answer keeps its pods until somebody confirms that it is dead")
        time.sleep(0.2)


def dry_run(cluster: Any, stages: list[Stage]) -> str:
    """Ask the cluster whether it would accept the jobs of stages, of each shape one; one line on what it said.

    Raises CuveeError with its reason where it refuses.
    """
    own = settings(cluster)
    try:
        api = Api(own.context, own.namespace)
        api.list("Job", labelSelector=f"{LABEL}=none")
    except (Unreachable, ConfigError) as error:
        return f"the manifests were not checked: {error}"
    shapes = {(stage.hosts, stage.processes, stage.device): stage for stage in stages}
    for stage in shapes.values():
        for manifest in manifests.render(own, stage):
            if manifest["kind"] == "TrainJob":  # refused without its runtime, which a dry run does not leave
                continue
            try:
                api.create(manifest, dry_run=True)
            except Refused as error:
                if error.status != CONFLICT:
                    raise
    return f"namespace {api.namespace} of {api.host} would accept the jobs ({len(shapes)} kinds of pods, dry run)"


def settings(cluster: Any) -> Settings:
    """The launcher's own fields of conf/cluster. Raises ConfigError for those that can't be right."""
    values = {k: v for k, v in OmegaConf.to_container(OmegaConf.create(cluster), resolve=True).items() if k not in COMMON}
    found = parse(Settings, values, "cluster")
    manifests.check(found, cluster)
    return found


def describe(cluster: Any, spec: Path, threads: int, flow: str = "") -> Stage:
    """The stage that a spec file describes, as it is first tried."""
    text = spec.read_bytes()
    wanted = json.loads(text)
    several = wanted["processes"] > 1
    return Stage(
        name=f"{title(wanted['name'], spec.parent.name)}-0", spec=str(spec), digest=hashlib.sha256(text).hexdigest()[:32],
        threads=threads, hosts=cluster.hosts if several else 1, processes=wanted["processes"], device=wanted["device"],
        flow=flow,
    )  # fmt: skip


def title(name: str, fingerprint: str) -> str:
    """A name for all that makes an artifact: short enough that the pods' own, made from it, are valid host names."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower())[:24].strip("-")
    return f"cuvee-{plain}-{re.sub(r'[^a-z0-9]+', '-', fingerprint.lower())[:12].strip('-')}"


def reference(api_version: str, kind: str, name: str, uid: str) -> dict[str, str]:
    return {"apiVersion": api_version, "kind": kind, "name": name, "uid": uid}


def outcome(owner: dict[str, Any]) -> bool | None:
    """Whether a job has succeeded (True) or failed (False); None while it goes on."""
    for condition in owner.get("status", {}).get("conditions") or []:
        if condition["status"] == "True" and condition["type"] in OVER:
            return OVER[condition["type"]]
    return None


def paths(inputs: dict[str, Any]) -> Iterator[str]:
    for one in inputs.values():
        if "path" in one:
            yield one["path"]
        else:
            yield from paths(one)
