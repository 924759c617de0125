"""infra/kubernetes: every overlay renders, is valid, asks for no more than it needs and holds no secret."""

import re

import pytest
import yaml

from tests.infra.rendered import COMPONENTS, KUBERNETES, OVERLAYS, ROOT, of_kind, overlay, pods, with_component, worker

CUSTOM = ("kueue.x-k8s.io/", "objectbucket.io/")  # whose schemas are not Kubernetes' own
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|AUTH|_KEY(_|$)|SESSION")


def test_every_file_is_yaml():
    for path in KUBERNETES.rglob("*.yaml"):
        assert list(yaml.safe_load_all(path.read_text())), path


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid(name):
    validate = pytest.importorskip("kubernetes_validate").validate
    for one in overlay(name):
        if not one["apiVersion"].startswith(CUSTOM):
            validate(one, "1.33", strict=True)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_goes_with_the_base(name, tmp_path):
    validate = pytest.importorskip("kubernetes_validate").validate
    objects = with_component(name, tmp_path)
    for one in objects:
        if not one["apiVersion"].startswith(CUSTOM):
            validate(one, "1.33", strict=True)
    head = (KUBERNETES / "components" / name / "kustomization.yaml").read_text()
    assert head.startswith("# "), f"{name} does not say what it is for"


def test_whoever_reads_the_bucket_has_its_keys_and_its_address(tmp_path):
    """Rook's claim, whose schema is not at hand either, leaves a Secret of the claim's name."""
    objects = with_component("ceph", tmp_path)
    (claim,), maps = of_kind(objects, "ObjectBucketClaim"), {m["metadata"]["name"]: m["data"] for m in of_kind(objects, "ConfigMap")}
    secret, settings = claim["metadata"]["name"], maps["cuvee-settings"]
    assert settings["secrets"] == secret and set(claim["spec"]) == {"bucketName", "storageClassName"}
    assert settings["store_uri"].startswith(f"s3://{claim['spec']['bucketName']}/")
    assert settings["mlflow_artifacts"].startswith(f"s3://{claim['spec']['bucketName']}/")
    host = re.fullmatch(r"http://[\w-]+\.([\w-]+)\.svc", maps["cuvee-s3"]["AWS_ENDPOINT_URL_S3"])
    (policy,) = (one for one in of_kind(objects, "NetworkPolicy") if one["metadata"]["name"] == "bucket")
    assert host[1] in str(policy["spec"]["egress"])
    for name, template in pods(objects):
        sources = [one["secretRef"]["name"] for one in template["spec"]["containers"][0].get("envFrom", []) if "secretRef" in one]
        assert sources == ([secret] if name in ("worker", "mlflow") else []), name


def test_the_fields_of_kueue_are_those_of_v1beta2():
    """Its schema is not at hand; these names are its documentation's."""
    queue, flavor, local = (of_kind(overlay("aws"), kind)[0] for kind in ("ClusterQueue", "ResourceFlavor", "LocalQueue"))
    assert {one["apiVersion"] for one in (queue, flavor, local)} == {"kueue.x-k8s.io/v1beta2"}
    assert set(queue["spec"]) <= {"namespaceSelector", "preemption", "resourceGroups"}
    assert local["spec"] == {"clusterQueue": queue["metadata"]["name"]}
    group = queue["spec"]["resourceGroups"][0]
    assert [r["name"] for r in group["flavors"][0]["resources"]] == group["coveredResources"]
    assert group["flavors"][0]["name"] == flavor["metadata"]["name"]
    assert f"cluster.queue={local['metadata']['name']}" in worker(overlay("aws"))["args"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_are_restricted(name):
    for pod, template in pods(overlay(name)):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0, pod
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, pod
        assert pod == "worker" or spec["automountServiceAccountToken"] is False, pod
        assert {kind for volume in spec["volumes"] for kind in volume if kind != "name"} <= {
            "emptyDir", "configMap", "secret", "persistentVolumeClaim"}, pod  # fmt: skip
        for container in spec["containers"]:
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                                    "capabilities": {"drop": ["ALL"]}}, pod  # fmt: skip
            assert container["resources"]["requests"] and container["resources"]["limits"]["memory"], pod
            assert re.search(r":v?\d+\.\d+", container["image"]), f"{pod}: {container['image']} is not pinned"


@pytest.mark.parametrize("name", OVERLAYS)
def test_secrets_are_named_and_not_held(name):
    objects, readme = overlay(name), (KUBERNETES / "README.md").read_text()
    assert not of_kind(objects, "Secret")
    for pod, template in pods(objects):
        spec = template["spec"]
        named = {v["secret"]["secretName"] for v in spec["volumes"] if "secret" in v}
        for container in spec["containers"]:
            named |= {e["secretRef"]["name"] for e in container.get("envFrom", []) if "secretRef" in e}
            for entry in container.get("env", []):
                reference = entry.get("valueFrom", {}).get("secretKeyRef")
                named |= {reference["name"]} if reference else set()
                place = re.search(r"(URI|URL|PATH|SECRETS)$", entry["name"])
                assert reference or place or not SECRET.search(entry["name"]), f"{pod}: {entry['name']} is a literal"
                assert not re.search(r"://[^/@]*:[^/@]*@", str(entry.get("value"))), f"{pod}: {entry['name']}"
        for secret in named:
            assert secret in readme, f"README does not say how to make the secret {secret}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_selectors_select(name):
    objects = overlay(name)
    labels = [template["metadata"]["labels"] for _, template in pods(objects)]
    from flows.launchers._kubernetes_manifests import Stage

    labels.append(Stage("x", "spec.json", "0", threads=1).labels)  # of the pods that the worker makes

    def selected(selector):
        wanted = selector.get("matchLabels", {}).items()
        some = [(e["key"], e["values"]) for e in selector.get("matchExpressions", [])]
        return [one for one in labels if wanted <= one.items() and all(one.get(k) in values for k, values in some)]

    for service in of_kind(objects, "Service"):
        assert len(selected({"matchLabels": service["spec"]["selector"]})) == 1, service["metadata"]["name"]
    for policy in of_kind(objects, "NetworkPolicy"):
        assert selected(policy["spec"]["podSelector"]), policy["metadata"]["name"]
        for rule in policy["spec"].get("ingress", []) + policy["spec"].get("egress", []):
            for peer in rule.get("from", []) + rule.get("to", []):
                assert "podSelector" not in peer or selected(peer["podSelector"]), policy["metadata"]["name"]
    covered = [one for policy in of_kind(objects, "NetworkPolicy") if policy["metadata"]["name"] != "default-deny"
               for one in selected(policy["spec"]["podSelector"]) if policy["metadata"]["name"] != "dns"]  # fmt: skip
    assert all(one in covered for one in labels), "somebody is cut off from everything"


def rights(objects):
    return {(resource, verb) for role in of_kind(objects, "Role", "ClusterRole") for rule in role["rules"]
            for resource in rule["resources"] for verb in rule["verbs"]}  # fmt: skip


def test_the_worker_may_do_what_the_launcher_does_and_no_more(tmp_path):
    from flows.launchers._kubernetes_api import GROUPS, PLURALS

    owner = {"get", "list", "watch", "create", "delete"}
    needed = {("jobs", verb) for verb in owner} | {("services", v) for v in ("get", "create", "patch", "delete")}
    needed |= {("pods", "list"), ("pods", "watch"), ("pods/log", "get")}
    objects = overlay("aws")
    assert rights(objects) == needed
    groups = {rule["resources"][0]: rule["apiGroups"] for role in of_kind(objects, "Role") for rule in role["rules"]}
    assert groups["jobs"] == ["batch"] and groups["pods"] == [""]
    assert {role["kind"] for role in of_kind(objects, "Role", "ClusterRole")} == {"Role"}
    more = {"JobSet": "jobset", "TrainJob": "trainjob", "TrainingRuntime": "trainjob", "Node": "node-loss"}
    for kind, plural in PLURALS.items():
        folder = tmp_path / kind
        folder.mkdir()
        having = with_component(more[kind], folder) if kind in more else objects
        assert any(resource == plural for resource, _ in rights(having)), kind
        if kind in more and kind in GROUPS:
            rules = [rule for role in of_kind(having, "Role") for rule in role["rules"] if plural in rule["resources"]]
            assert GROUPS[kind].split("/")[1] in rules[0]["apiGroups"], kind


@pytest.mark.parametrize("name", [*OVERLAYS, "jobset", "trainjob"])
def test_the_workers_defaults_are_a_configuration(name, tmp_path):
    """What the worker starts with, as Kubernetes expands it, composes, and the launcher takes it."""
    from flows.config import compose
    from flows.launchers import kubernetes

    objects = overlay(name) if name in OVERLAYS else with_component(name, tmp_path)
    maps = {one["metadata"]["name"]: one["data"] for one in of_kind(objects, "ConfigMap")}
    command, *overrides = worker(objects)["args"]
    for entry in worker(objects)["env"]:
        reference = entry.get("valueFrom", {}).get("configMapKeyRef")
        if reference:
            value = maps[reference["name"]][reference["key"]]
            overrides = [o.replace(f"$({entry['name']})", value) for o in overrides]
    conf = compose(overrides)
    settings = kubernetes.settings(conf.cluster)
    assert command == "worker" and "$(" not in "".join(overrides)
    claims = {one["metadata"]["name"] for one in of_kind(objects, "PersistentVolumeClaim")}
    assert settings.volume.claim in claims and set(settings.config_maps) <= set(maps)
    mounts = {mount["name"]: mount["mountPath"] for mount in worker(objects)["volumeMounts"]}
    assert mounts["cuvee"] == settings.volume.path
    state = next(entry["value"] for entry in worker(objects)["env"] if entry["name"] == "CUVEE_STATE")
    assert state.startswith(settings.volume.path + "/")
    assert settings.service_account in {one["metadata"]["name"] for one in of_kind(objects, "ServiceAccount")}


def test_versions_agree():
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for path in [*KUBERNETES.rglob("*.yaml"), *(ROOT / "infra/compose").glob("*.yaml"), *(ROOT / "infra/images").iterdir()]:
        for image, tag in re.findall(r"(cuvee-(?:data|train))(?::|, newName: \S+, newTag: )([\d.]+\d)", path.read_text()):
            assert tag == version, f"{path}: {image}"
    images = [set(re.findall(r"image: ((?:postgres|prom/pushgateway)\S*)", path.read_text()))
              for path in (ROOT / "infra/compose/docker-compose.yaml", KUBERNETES / "base/postgres.yaml")]  # fmt: skip
    assert images[1] <= images[0]
