"""The Kubernetes API through the official client's connection, in plain dictionaries.

Its typed calls read a manifest into their own models first and drop what these do not know; here the server sees every
field, refuses unknown ones (fieldValidation=Strict), and JobSet and TrainJob need no code of their own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, urlsplit

from stages.stage import ConfigError, CuveeError

PLURALS = {"Job": "jobs", "Service": "services", "Pod": "pods", "Node": "nodes", "JobSet": "jobsets",
           "TrainJob": "trainjobs", "TrainingRuntime": "trainingruntimes"}  # fmt: skip
GROUPS = {"Job": "apis/batch/v1", "JobSet": "apis/jobset.x-k8s.io/v1alpha2", "TrainJob": "apis/trainer.kubeflow.org/v1alpha1",
          "TrainingRuntime": "apis/trainer.kubeflow.org/v1alpha1"}  # fmt: skip
TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two bytes
WATCH_SECONDS = 240
CONFLICT, GONE, NOT_FOUND, FORBIDDEN = 409, 410, 404, 403


class Refused(CuveeError):
    """The server's answer was no: `status` is HTTP's, `reason` the server's own sentence."""

    def __init__(self, sentence: str, status: int, reason: str):
        super().__init__(sentence)
        self.status, self.reason = status, reason


class Unreachable(CuveeError):
    """No answer came from the server."""


class Api:
    """One namespace of a cluster: the one of KUBECONFIG's context, or the one that this pod runs in.

    Raises ConfigError where neither is to be found.
    """

    def __init__(self, context: str = "", namespace: str = ""):
        try:
            from kubernetes import client, config
        except ImportError:
            raise ConfigError("cluster.launcher: kubernetes needs its client; pip install 'cuvee[kubernetes]'") from None
        self._errors = client.ApiException
        settings = client.Configuration()
        try:
            place = os.environ.get("KUBECONFIG") or config.KUBE_CONFIG_DEFAULT_LOCATION
            config.load_kube_config(place, context or None, settings)
            found = _namespace(config, place, context)
        except config.ConfigException as outside:
            try:
                config.load_incluster_config(client_configuration=settings)
                with open("/var/run/secrets/kubernetes.io/serviceaccount/namespace") as file:
                    found = file.read().strip()
            except (config.ConfigException, OSError):
                raise ConfigError(f"cluster.context={context!r}: no Kubernetes cluster is configured here ({outside}); set "
                                  "KUBECONFIG, or write ~/.kube/config") from None
        settings.retries = False  # asked again where it is called, with a log line
        self.namespace, self.host = namespace or found or "default", settings.host
        self._client = client.ApiClient(settings)

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        """The object, or None where there is none of that name."""
        try:
            return self._json("GET", self._path(kind, name))
        except Refused as error:
            if error.status == NOT_FOUND:
                return None
            raise

    def list(self, kind: str, **selectors: str) -> dict[str, Any]:
        """{"items", the oldest first, "metadata": {"resourceVersion"}}; selectors: labelSelector, fieldSelector."""
        listing = self._json("GET", self._path(kind), selectors)
        listing["items"].sort(key=lambda item: item["metadata"].get("creationTimestamp", ""))
        return listing

    def create(self, manifest: dict[str, Any], dry_run: bool = False) -> dict[str, Any]:
        """Raises Refused with status CONFLICT where the name is taken."""
        query = {"fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        return self._json("POST", self._path(manifest["kind"]), query, manifest)

    def patch(self, kind: str, name: str, change: dict[str, Any], part: str = "") -> dict[str, Any]:
        path = self._path(kind, name) + (f"/{part}" if part else "")
        query = {"fieldValidation": "Strict"}
        return self._json("PATCH", path, query, change, "application/merge-patch+json")

    def delete(self, kind: str, name: str, propagation: str = "Background") -> bool:
        """Ask for the end of an object; False where it is gone. All options go in the body: it overrides the query."""
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        try:
            self._json("DELETE", self._path(kind, name), {}, options)
            return True
        except Refused as error:
            if error.status == NOT_FOUND:
                return False
            raise

    def events(self, kind: str, version: str, **selectors: str) -> Iterator[dict[str, Any]]:
        """{"type", "object"} of every change after `version`, until the server ends the watch. Raises Refused with
        status GONE where it does not remember that version any more."""
        query = selectors | {"watch": "true", "resourceVersion": version, "allowWatchBookmarks": "true",
                             "timeoutSeconds": str(WATCH_SECONDS)}  # fmt: skip
        for line in self.lines(self._path(kind), query, WATCH_SECONDS + 60.0):
            event = json.loads(line)
            if event["type"] == "ERROR":
                status = event["object"]
                raise Refused(status.get("message", "the watch failed"), status.get("code", 500), "watch")
            yield event

    def log(self, pod: str, since: str = "") -> Iterator[str]:
        """The lines of a pod's log with their time before them, as they are written, until the container ends."""
        query = {"follow": "true", "timestamps": "true"} | ({"sinceTime": since} if since else {})
        yield from self.lines(self._path("Pod", pod) + "/log", query, 3600.0)

    def lines(self, path: str, query: dict[str, str], silence: float) -> Iterator[str]:
        """The lines of a streamed answer. silence: seconds without a byte after which the connection counts as lost."""
        response = self._send("GET", path, query, timeout=(TIMEOUT[0], silence)).response
        pending = b""
        try:
            if response.status >= 300:
                raise self._refused("GET", path, response.status, response.read())
            for chunk in self._patiently(response.stream, 65536):
                *whole, pending = (pending + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in whole)
            if pending:
                yield pending.decode(errors="replace")
        finally:
            response.close()

    def _patiently(self, stream: Callable[..., Iterator[bytes]], size: int) -> Iterator[bytes]:
        from urllib3.exceptions import HTTPError

        try:
            yield from stream(size)
        except HTTPError as error:
            raise Unreachable(f"the Kubernetes API at {self.host} broke off: {error}") from None

    def _path(self, kind: str, name: str = "") -> str:
        space = "" if kind == "Node" else f"/namespaces/{self.namespace}"
        return f"/{GROUPS.get(kind, 'api/v1')}{space}/{PLURALS[kind]}" + (f"/{quote(name)}" if name else "")

    def _json(
        self, method: str, path: str, query: dict[str, str] | None = None, body: Any = None, kind: str = "application/json"
    ) -> dict[str, Any]:
        response = self._send(method, path, query or {}, body, kind)
        data = response.read()
        if response.status >= 300:
            raise self._refused(method, path, response.status, data)
        return json.loads(data)

    def _send(
        self, method: str, path: str, query: dict[str, str], body: Any = None, kind: str = "application/json",
        timeout: tuple[float, float] = TIMEOUT,
    ) -> Any:  # fmt: skip
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json", "Content-Type": kind}
        url, pairs = path, list(query.items())
        try:
            method, url, headers, body, post = self._client.param_serialize(
                method, path, query_params=pairs, header_params=headers, body=body, auth_settings=["BearerToken"]
            )
            return self._client.call_api(method, url, headers, body, post, _request_timeout=timeout)
        except self._errors as error:
            if not error.status:  # a certificate that is not trusted, and the like
                raise Unreachable(f"the Kubernetes API at {self.host} could not be asked: {error.reason}") from None
            raise self._refused(method, path, error.status, (error.body or "").encode()) from None
        except (HTTPError, OSError) as error:
            raise Unreachable(f"the Kubernetes API at {self.host} does not answer ({type(error).__name__}); check the "
                              "network, and KUBECONFIG's context") from None

    def _refused(self, method: str, path: str, status: int, data: bytes) -> Refused:
        try:
            reason = json.loads(data)["message"]
        except (ValueError, KeyError, TypeError):
            reason = data[:300].decode(errors="replace").strip() or "no reason given"
        way = {401: "; log in to the cluster again", FORBIDDEN: "; the role in infra/kubernetes has all rights that are needed"}
        server = urlsplit(self.host).netloc
        sentence = f"namespace {self.namespace} of {server}: {method} {path.rsplit('/', 1)[-1]}: {reason}{way.get(status, '')}"
        return Refused(sentence.replace("\n", " "), status, reason)


def patiently(call: Callable[[], Any], log: Callable[[str], None], seconds: float = 120.0) -> Any:
    """What `call` gives, asked again while the server does not answer or is overloaded, at most for `seconds`."""
    deadline, wait = time.monotonic() + seconds, 0.5
    while True:
        try:
            return call()
        except (Unreachable, Refused) as error:
            passing = isinstance(error, Unreachable) or error.status in (429, 500, 502, 503, 504)
            if not passing or time.monotonic() + wait > deadline:
                raise
            log(f"{error}; asking again")
        time.sleep(wait)
        wait = min(2 * wait, 15.0)


def _namespace(config: Any, place: str, context: str) -> str:
    contexts, active = config.list_kube_config_contexts(place)
    chosen = next((one for one in contexts if one["name"] == context), active)
    return chosen["context"].get("namespace", "")
