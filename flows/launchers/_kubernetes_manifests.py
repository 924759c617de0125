"""What a stage is to a cluster, as plain dictionaries: pure functions of the cluster's settings and the stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stages.run import AGAIN, FAILED, REFUSED
from stages.stage import ConfigError, option

LABEL, FLOW = "cuvee.dev/run", "cuvee.dev/flow"  # of all that one attempt at a stage creates; of all that one run does
INDEX = "batch.kubernetes.io/job-completion-index"
SPEC = "cuvee.dev/spec"  # the digest of what the job was started from
PORT = "meeting"


@dataclass
class Volume:
    claim: str = option("cuvee", "name of a PersistentVolumeClaim that many nodes may write (ReadWriteMany)")
    path: str = option("/cuvee", "where it is mounted, in every pod and wherever `cuvee run` is started")


@dataclass
class Settings:
    """The fields of a conf/cluster file that only this launcher knows."""

    kind: str = option("job", "what a stage becomes", choices=("job", "jobset", "trainjob"))
    context: str = option("", "context of KUBECONFIG; empty: the current one, or the cluster that this runs in")
    namespace: str = option("", "where everything is created; empty: the context's")
    image: str = option("", "container image of stages that use a GPU (infra/images/train.Dockerfile)")
    data_image: str = option("", "container image of all others and of the run itself (infra/images/data.Dockerfile)")
    service_account: str = option("cuvee-worker", "of the pod that `cuvee submit` starts: it makes jobs (infra/kubernetes)")
    run_env: dict[str, str] = option({}, "environment of that pod; secret:NAME/KEY stands for an entry of a Secret")
    run_memory_gib: float = option(8.0, "memory of that pod in GiB")
    volume: Volume = option(Volume, "shared by all pods: work in progress, checkpoints, copies of artifacts")
    host_memory_gib: float = option(16.0, "memory of a pod in GiB")
    shm_gib: float = option(8.0, "shared memory of a pod in GiB, part of host_memory_gib; NCCL and data workers use it")
    gpu: str = option("nvidia.com/gpu", "resource name of a GPU")
    resources: dict[str, str] = option({}, "more resources of a pod of a stage that trains, e.g. {rdma/hca: '8'}")
    queue: str = option("", "Kueue's local queue; empty: none")
    priority_class: str = option("", "PriorityClass of the pods; empty: the namespace's default")
    env: dict[str, str] = option({}, "environment of the stages, e.g. {NCCL_SOCKET_IFNAME: eth0}; never a secret")
    config_maps: list[str] = option([], "ConfigMaps whose entries become environment variables")
    secrets: list[str] = option([], "Secrets whose entries become environment variables, e.g. credentials of a bucket")
    pod: dict[str, Any] = option({}, "merged into every pod's spec, e.g. {nodeSelector: {pool: h100}}")
    user: int = option(10001, "user and group that the containers run as")
    port: int = option(29500, "of the first pod, where the others meet")
    restarts: int = option(3, "how often the pods of a job may fail together; evictions don't count")
    grace_seconds: int = option(120, "that a pod has to save a checkpoint when it is evicted")
    start_seconds: int = option(900, "after which a pod that can't start (image, missing secret) ends the stage")
    keep_seconds: int = option(86400, "that a finished job stays to be looked at")
    dead_node_seconds: int = option(0, "silence after which a node counts as dead; 0: never, somebody has to confirm it")


@dataclass(frozen=True)
class Stage:
    """One attempt at a stage. name: of everything that is created. hosts pods run `processes` processes together. flow: the
    job of the run that it is part of, if that runs in the cluster too."""

    name: str
    spec: str
    digest: str
    threads: int
    hosts: int = 1
    processes: int = 1
    device: str = "cpu"
    flow: str = ""

    @property
    def labels(self) -> dict[str, str]:
        return {"app.kubernetes.io/name": "cuvee", LABEL: self.name} | ({FLOW: self.flow} if self.flow else {})


def kind(settings: Settings, stage: Stage) -> str:
    """"job", "jobset" or "trainjob": a stage of one process is a job on any cluster."""
    return settings.kind if stage.processes > 1 else "job"


def render(settings: Settings, stage: Stage) -> list[dict[str, Any]]:
    """The manifests of a stage in the order of their creation; the last one is what runs it, and owns the others."""
    if kind(settings, stage) == "job":
        return [*_service(settings, stage), _job(settings, stage)]
    job_set = {"replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": _job_spec(settings, stage)}}]}
    if kind(settings, stage) == "jobset":
        job_set |= {"network": {"enableDNSHostnames": True, "subdomain": stage.name, "publishNotReadyAddresses": True},
                    "failurePolicy": {"maxRestarts": 0}, "ttlSecondsAfterFinished": settings.keep_seconds}  # fmt: skip
        return [_object("jobset.x-k8s.io/v1alpha2", "JobSet", settings, stage, job_set, queue=True)]
    # A runtime of the stage's own: overrides of another's pods have had another name in every release of the trainer.
    node = job_set["replicatedJobs"][0]["template"]
    node["metadata"] = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    runtime = {"mlPolicy": {"numNodes": stage.hosts}, "template": {"spec": job_set}}
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": stage.name}
    api = "trainer.kubeflow.org/v1alpha1"
    return [_object(api, "TrainingRuntime", settings, stage, runtime),
            _object(api, "TrainJob", settings, stage, {"runtimeRef": reference}, queue=True)]  # fmt: skip


def meeting_host(settings: Settings, stage: Stage) -> str:
    """The name of the first pod, which is the same whichever pod has that index."""
    if kind(settings, stage) == "job":
        return f"{stage.name}-0.{stage.name}"
    return f"{stage.name}-node-0-0.{stage.name}"


def _object(
    api: str, name: str, settings: Settings, stage: Stage, spec: dict[str, Any], queue: bool = False
) -> dict[str, Any]:
    labels = stage.labels | ({"kueue.x-k8s.io/queue-name": settings.queue} if queue and settings.queue else {})
    metadata = {"name": stage.name, "labels": labels, "annotations": {SPEC: stage.digest}}
    return {"apiVersion": api, "kind": name, "metadata": metadata, "spec": spec}


def _service(settings: Settings, stage: Stage) -> list[dict[str, Any]]:
    """Names for the pods, also before they are ready: they wait for one another."""
    if stage.hosts == 1:
        return []
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {LABEL: stage.name},
            "ports": [{"name": PORT, "port": settings.port}]}  # fmt: skip
    return [_object("v1", "Service", settings, stage, spec)]


def _job(settings: Settings, stage: Stage) -> dict[str, Any]:
    spec = _job_spec(settings, stage) | {"ttlSecondsAfterFinished": settings.keep_seconds}
    return _object("batch/v1", "Job", settings, stage, spec, queue=True)


def _job_spec(settings: Settings, stage: Stage) -> dict[str, Any]:
    # Of several pods an exception in one may only follow from the loss of another; of one it is a defect.
    final = [REFUSED] if stage.hosts > 1 else [FAILED, REFUSED]
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {"containerName": "node", "operator": "In", "values": [AGAIN]}},
        {"action": "FailJob", "onExitCodes": {"containerName": "node", "operator": "In", "values": final}},
    ]
    return {
        "completionMode": "Indexed", "completions": stage.hosts, "parallelism": stage.hosts,
        "backoffLimit": settings.restarts * stage.hosts,  # who loses the first pod fails too
        "podReplacementPolicy": "Failed", "podFailurePolicy": {"rules": rules},
        "template": {"metadata": {"labels": stage.labels}, "spec": _pod(settings, stage)},
    }  # fmt: skip


def _pod(settings: Settings, stage: Stage) -> dict[str, Any]:
    gpus = stage.processes // stage.hosts if stage.device == "cuda" else 0
    limits = {"memory": f"{settings.host_memory_gib:g}Gi"} | ({settings.gpu: str(gpus)} if gpus else {})
    limits |= settings.resources if stage.processes > 1 else {}
    container = {
        "name": "node", "image": settings.image if stage.device == "cuda" else settings.data_image,
        "command": ["python", "-m", "stages.launch", stage.spec], "env": _environment(settings, stage),
        "resources": {"requests": {"cpu": str(stage.threads)} | limits, "limits": limits},
    }  # fmt: skip
    if kind(settings, stage) == "job" and stage.hosts > 1:
        container["ports"] = [{"name": PORT, "containerPort": settings.port}]
    spec = pod(settings, container)
    spec["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{settings.shm_gib:g}Gi"}})
    container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    if kind(settings, stage) == "job" and stage.hosts > 1:
        spec["subdomain"] = stage.name
    # A node that is silent for long is lost: the default of five minutes is more than a restart takes.
    away = ({"key": f"node.kubernetes.io/{key}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}
            for key in ("not-ready", "unreachable"))  # fmt: skip
    return merge(spec | {"automountServiceAccountToken": False, "tolerations": list(away)}, settings.pod)


def run_job(settings: Settings, name: str, command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The job of a whole run: one pod that may make the jobs of stages, and is started again until the run is over."""
    labels = {"app.kubernetes.io/name": "worker", LABEL: name, FLOW: name}  # infra/kubernetes lets a worker talk to servers
    mine = (("CUVEE_FLOW_JOB", "batch.kubernetes.io/job-name"), ("CUVEE_FLOW_UID", "batch.kubernetes.io/controller-uid"))
    own = [{"name": key, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{label}']"}}} for key, label in mine]
    container = {
        "name": "run", "image": settings.data_image, "command": command,
        "env": variables({"HOME": "/tmp", **environment, **settings.run_env}) + own,
        "resources": {"requests": {"cpu": "1", "memory": f"{settings.run_memory_gib:g}Gi"},
                      "limits": {"memory": f"{settings.run_memory_gib:g}Gi"}},
    }  # fmt: skip
    final = {"containerName": "run", "operator": "In", "values": [FAILED, 2]}  # a defect; one sentence to the user
    rules = [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
             {"action": "FailJob", "onExitCodes": final}]  # fmt: skip
    template = {"metadata": {"labels": labels},
                "spec": pod(settings, container) | {"serviceAccountName": settings.service_account}}  # fmt: skip
    spec = {"completionMode": "Indexed", "completions": 1, "parallelism": 1, "backoffLimit": settings.restarts,
            "podReplacementPolicy": "Failed", "podFailurePolicy": {"rules": rules}, "template": template,
            "ttlSecondsAfterFinished": settings.keep_seconds}  # fmt: skip
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "labels": labels}, "spec": spec}


def pod(settings: Settings, container: dict[str, Any]) -> dict[str, Any]:
    """The pod spec of one container on the shared volume, without rights; the container is completed."""
    references = [{"configMapRef": {"name": name}} for name in settings.config_maps]
    references += [{"secretRef": {"name": name}} for name in settings.secrets]
    container |= {"envFrom": references} if references else {}
    container["volumeMounts"] = [{"name": "cuvee", "mountPath": settings.volume.path}, {"name": "tmp", "mountPath": "/tmp"}]
    container["securityContext"] = {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    spec = {
        "restartPolicy": "Never", "terminationGracePeriodSeconds": settings.grace_seconds, "containers": [container],
        "volumes": [{"name": "cuvee", "persistentVolumeClaim": {"claimName": settings.volume.claim}},
                    {"name": "tmp", "emptyDir": {}}],
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": settings.user, "runAsGroup": settings.user, "fsGroup": settings.user,
            "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
        },
    }  # fmt: skip
    return spec | ({"priorityClassName": settings.priority_class} if settings.priority_class else {})


def _environment(settings: Settings, stage: Stage) -> list[dict[str, Any]]:
    threads = max(1, stage.threads * stage.hosts // stage.processes)
    found = variables({"HOME": "/tmp", "OMP_NUM_THREADS": str(threads), **settings.env})
    if stage.hosts > 1:
        found += variables({"CUVEE_HOSTS": str(stage.hosts), "CUVEE_RUN": stage.name,
                            "CUVEE_RENDEZVOUS": f"{meeting_host(settings, stage)}:{settings.port}"})  # fmt: skip
        found.append({"name": "CUVEE_ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})
    return found


def variables(values: dict[str, str]) -> list[dict[str, Any]]:
    """Environment variables. `$(` is doubled: Kubernetes expands it. "secret:NAME/KEY" is an entry of a Secret."""
    found = []
    for name, value in values.items():
        if value.startswith("secret:"):
            secret, _, key = value.removeprefix("secret:").partition("/")
            found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
        else:
            found.append({"name": name, "value": value.replace("$(", "$$(")})
    return found


def merge(base: Any, change: Any) -> Any:
    """`base` with `change` over it: dictionaries key by key, lists one after the other, anything else replaced."""
    if isinstance(base, dict) and isinstance(change, dict):
        return base | {key: merge(base[key], value) if key in base else value for key, value in change.items()}
    if isinstance(base, list) and isinstance(change, list):
        return base + change
    return change


def check(settings: Settings, cluster: Any) -> None:
    """Raises ConfigError for what no cluster could run."""
    if not settings.data_image or (cluster.device == "cuda" and not settings.image):
        field = "data_image" if not settings.data_image else "image"
        raise ConfigError(f"cluster.{field} is empty; give the image that was built from infra/images, as "
                          "registry/name:tag")
    if cluster.devices % cluster.hosts:
        raise ConfigError(f"cluster.devices: {cluster.devices} do not divide into cluster.hosts={cluster.hosts}; give "
                          "every host the same number")
