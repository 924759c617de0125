"""A Kubernetes API server for tests: the part of the API that the launcher uses, over HTTP, for the unmodified client.

Strict field validation against Kubernetes' own schemas, resource versions, watches that expire, owner references and
foreground deletion, evictions. What runs jobs and pods is beside it: controllers.py.
"""

from __future__ import annotations

import copy
import json
import re
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import kubernetes_validate

VERSION = "1.36"
TOKEN = "tests-only"
PATH = re.compile(r"/(?:api/v1|apis/([^/]+)/([^/]+))(?:/namespaces/([^/]+))?/([a-z]+)(?:/([^/]+))?(?:/([a-z]+))?")
KINDS = {"pods": "Pod", "services": "Service", "jobs": "Job", "nodes": "Node"}


def now(seconds: float = 0.0) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="seconds").replace("+00:00", "Z")


class Refusal(Exception):
    def __init__(self, code: int, reason: str, message: str):
        super().__init__(message)
        self.status = {"apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": reason,
                       "message": message}  # fmt: skip


class Objects:
    """All objects of the cluster, and the history of their changes. `changed` is notified of each."""

    def __init__(self):
        self.changed = threading.Condition(threading.RLock())
        self.items: dict[tuple[str, str], dict] = {}
        self.history: list[tuple[int, str, str, dict]] = []  # version, plural, type, object
        self.version = self.oldest = 100

    def _note(self, plural: str, kind: str, item: dict) -> None:
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, plural, kind, copy.deepcopy(item)))
        self.changed.notify_all()

    def expire(self) -> None:
        """Forget the history: a watch that has not read all of it gets 410."""
        with self.changed:
            self.version += 1
            self.oldest, self.history = self.version, []
            self.changed.notify_all()

    def all(self, plural: str) -> list[dict]:
        with self.changed:
            return [copy.deepcopy(item) for (found, _), item in self.items.items() if found == plural]

    def get(self, plural: str, name: str) -> dict:
        with self.changed:
            if (plural, name) not in self.items:
                raise Refusal(404, "NotFound", f'{plural} "{name}" not found')
            return copy.deepcopy(self.items[plural, name])

    def create(self, plural: str, item: dict, dry: bool = False) -> dict:
        with self.changed:
            name = item["metadata"]["name"]
            if (plural, name) in self.items:
                raise Refusal(409, "AlreadyExists", f'{plural} "{name}" already exists')
            item = copy.deepcopy(item)
            item["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "namespace": "default"}
            item.setdefault("status", {})
            if not dry:
                self.items[plural, name] = item
                self._note(plural, "ADDED", item)
            return copy.deepcopy(item)

    def update(self, plural: str, name: str, change) -> dict:
        """Apply the function `change` to the object in place."""
        with self.changed:
            self.get(plural, name)
            item = self.items[plural, name]
            before = copy.deepcopy(item)
            change(item)
            if item != before:
                self._note(plural, "MODIFIED", item)
            return copy.deepcopy(item)

    def remove(self, plural: str, name: str) -> None:
        """For good, and what it owns."""
        with self.changed:
            item = self.items.pop((plural, name), None)
            if item is None:
                return
            self._note(plural, "DELETED", item)
            for kind, child in self.owned(item):
                self.delete(kind, child["metadata"]["name"], {})

    def owned(self, owner: dict) -> list[tuple[str, dict]]:
        uid = owner["metadata"]["uid"]
        return [(plural, item) for (plural, _), item in list(self.items.items())
                if uid in [o["uid"] for o in item["metadata"].get("ownerReferences", [])]]  # fmt: skip

    def delete(self, plural: str, name: str, options: dict) -> dict:
        with self.changed:
            item = self.get(plural, name)
            if plural == "pods":
                grace = options.get("gracePeriodSeconds", item["spec"].get("terminationGracePeriodSeconds", 30))
                if grace == 0 or not item["spec"].get("nodeName"):
                    self.remove(plural, name)
                else:
                    self.update(plural, name, lambda pod: pod["metadata"].setdefault("deletionTimestamp", now(grace)))
            elif options.get("propagationPolicy") == "Foreground":
                self.update(plural, name, lambda it: it["metadata"].update(
                    deletionTimestamp=now(), finalizers=["foregroundDeletion"]))  # fmt: skip
            else:
                self.remove(plural, name)
            return item

    def evict(self, pod: str) -> None:
        """As a drain or a pre-emption does."""
        self.update("pods", pod, lambda it: set_condition(it, "DisruptionTarget", "True", "EvictionByEvictionAPI"))
        self.delete("pods", pod, {})

    def collect(self) -> None:
        """Foreground deletion: the dependents first, then the owner."""
        with self.changed:
            for (plural, name), item in list(self.items.items()):
                if "foregroundDeletion" in item["metadata"].get("finalizers", []):
                    owned = self.owned(item)
                    for kind, child in owned:
                        if "deletionTimestamp" not in child["metadata"]:
                            self.delete(kind, child["metadata"]["name"], {"propagationPolicy": "Foreground"})
                    if not owned:
                        self.remove(plural, name)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do(self):
        self.url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(self.url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path, body))
        try:
            if self.server.broken.is_set():
                raise Refusal(503, "ServiceUnavailable", "the server is currently unable to handle the request")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refusal(401, "Unauthorized", "Unauthorized")
            answer = self._answer(json.loads(body) if body else None)
        except Refusal as refusal:
            return self._send(refusal.status["code"], refusal.status)
        if answer is not None:
            self._send(201 if self.command == "POST" else 200, answer)

    do_GET = do_POST = do_PATCH = do_DELETE = do

    def _send(self, code: int, answer: dict) -> None:
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, body: dict | None) -> dict | None:
        objects = self.server.objects
        match = PATH.fullmatch(unquote(self.url.path))
        if not match or match[4] not in KINDS:  # as where JobSet or Kubeflow is not installed
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        plural, name, part = match[4], match[5], match[6]
        self._authorize(match[1] or "", plural + (f"/{part}" if part else ""), bool(name))
        if self.command == "GET" and part == "log":
            return self._log(name)
        if self.command == "GET" and name:
            return objects.get(plural, name)
        if self.command == "GET":
            return self._watch(plural) if self.query.get("watch") == "true" else self._list(plural)
        if self.command == "POST":
            self._validate(body, KINDS[plural])
            return objects.create(plural, body, dry=self.query.get("dryRun") == "All")
        if self.command == "DELETE":
            return objects.delete(plural, name, body or self.query)  # with a body the query does not count
        self._want_strict()
        change = {"status": body["status"]} if part == "status" else {k: v for k, v in body.items() if k != "status"}
        return objects.update(plural, name, lambda item: merge_patch(item, change))

    def _authorize(self, group: str, resource: str, named: bool) -> None:
        watched = "watch" if self.query.get("watch") == "true" else "list"
        verb = {"GET": "get" if named else watched, "POST": "create", "PATCH": "patch", "DELETE": "delete"}[self.command]
        if (group, resource, verb) not in self.server.rights:
            raise Refusal(403, "Forbidden", f'{resource} is forbidden: User "tests" cannot {verb} resource "{resource}"')

    def _want_strict(self) -> None:
        if self.query.get("fieldValidation") != "Strict":
            raise Refusal(400, "BadRequest", "these tests want fieldValidation=Strict on every creation and change")

    def _validate(self, body: dict, kind: str) -> None:
        self._want_strict()
        if body.get("kind") != kind:
            raise Refusal(400, "BadRequest", f"{body.get('kind')} is not a {kind}")
        try:
            kubernetes_validate.validate(body, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            message = str(error).splitlines()[0]
            raise Refusal(400, "BadRequest", f'{kind} in version "v1" cannot be handled: strict decoding error: {message}') from None

    def _list(self, plural: str) -> dict:
        objects = self.server.objects
        with objects.changed:
            items = [item for item in objects.all(plural) if self._selected(item)]
            return {"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": str(objects.version)}, "items": items}

    def _selected(self, item: dict) -> bool:
        pairs = [one.split("=", 1) for one in self.query.get("labelSelector", "").split(",") if one]
        labels = item["metadata"].get("labels", {})
        names = [one.split("=", 1)[1] for one in self.query.get("fieldSelector", "").split(",") if one]
        return all(labels.get(key) == value for key, value in pairs) and all(item["metadata"]["name"] == n for n in names)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _watch(self, plural: str) -> None:
        objects, version = self.server.objects, int(self.query["resourceVersion"])
        self._stream()
        deadline = time.monotonic() + float(self.query.get("timeoutSeconds", 60))
        try:
            while time.monotonic() < deadline and not self.server.stopping.is_set():
                with objects.changed:
                    if version < objects.oldest:
                        error = Refusal(410, "Expired", f"too old resource version: {version} ({objects.oldest})").status
                        self._chunk(json.dumps({"type": "ERROR", "object": error}).encode() + b"\n")
                        break
                    new = [change for change in objects.history if change[0] > version]
                    if not new:
                        objects.changed.wait(0.2)
                for at, kind, change, item in new:
                    version = at
                    if kind == plural and self._selected(item):
                        self._chunk(json.dumps({"type": change, "object": item}).encode() + b"\n")
            self._chunk(b"")
        except OSError:  # the client has gone
            self.close_connection = True

    def _log(self, name: str) -> None:
        objects, since = self.server.objects, self.query.get("sinceTime", "")
        objects.get("pods", name)
        log = self.server.logs.get(name)
        if log is None:
            raise Refusal(400, "BadRequest", f'container "node" in pod "{name}" is waiting to start: ContainerCreating')
        if log.lost:
            raise Refusal(500, "InternalError", "dial tcp: no route to host")
        self._stream()
        sent, cuts = 0, self.server.cuts
        try:
            while True:
                with log.changed:
                    if sent == len(log.lines) and not log.over:
                        log.changed.wait(0.2)
                    new, over = log.lines[sent:], log.over
                sent += len(new)
                for stamp, line in new:
                    if stamp[:19] >= since[:19]:
                        self._chunk(f"{stamp} {line}\n".encode())
                if self.server.cuts != cuts or log.lost:  # as a proxy or a kubelet that is restarted does
                    self.close_connection = True
                    return self.connection.shutdown(2)
                if over and not new:
                    return self._chunk(b"")
        except OSError:
            self.close_connection = True


class Server(ThreadingHTTPServer):
    """Serves on loopback until `close`. `broken`: answer 503. `rights`: (group, resource, verb) that the token has."""

    daemon_threads = True

    def __init__(self, rights: set[tuple[str, str, str]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects, self.logs, self.requests, self.rights = Objects(), {}, [], rights
        self.broken, self.stopping, self.cuts = threading.Event(), threading.Event(), 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()


def set_condition(item: dict, kind: str, status: str, reason: str = "", message: str = "") -> None:
    conditions = item["status"].setdefault("conditions", [])
    conditions[:] = [one for one in conditions if one["type"] != kind]
    conditions.append({"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": now()})


def merge_patch(item: dict, change: dict) -> None:
    """RFC 7386, in place."""
    for key, value in change.items():
        if value is None:
            item.pop(key, None)
        elif isinstance(value, dict) and isinstance(item.get(key), dict):
            merge_patch(item[key], value)
        else:
            item[key] = copy.deepcopy(value)
