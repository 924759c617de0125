"""The lines of pods: all of them, in order, however late or badly a log can be read."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace

import pytest

from flows.launchers import _kubernetes_watch
from flows.launchers._kubernetes_api import Api, Refused, Unreachable
from flows.launchers._kubernetes_pods import Pods
from flows.launchers._kubernetes_watch import LAST_TRIES, follow_log


@pytest.mark.parametrize("error", [Unreachable("reset"), Refused("no route to host", 500, "")])
@pytest.mark.parametrize("failures, lines", [(2, ["one", "two"]), (LAST_TRIES, [])])
def test_the_log_of_an_ended_pod_is_asked_for_again_but_not_for_ever(monkeypatch, error, failures, lines):
    class Server:
        asked = 0

        def log(self, pod, since):
            self.asked += 1
            if self.asked <= failures:
                raise error
            yield from ("2026-01-01T00:00:00.1Z one", "2026-01-01T00:00:00.2Z two")

    monkeypatch.setattr(_kubernetes_watch, "PATIENCE", 0.01)
    heard, server = [], Server()
    follow_log(server, "a pod", lambda: True, heard.append, threading.Event())
    assert heard == lines and server.asked <= LAST_TRIES


def test_a_pod_that_takes_another_s_place_is_heard_after_it():
    """However late the first one's log can be read, and in whatever order the server lists the two."""
    ended = {"phase": "Failed", "containerStatuses": [{"state": {"terminated": {"exitCode": 137}}}]}

    class Server(Api):
        asked = 0

        def __init__(self):
            pass

        def _path(self, kind):
            return kind

        def _json(self, *request):
            items = [{"metadata": {"name": name, "creationTimestamp": f"2026-01-01T00:00:0{second}Z"}, "status": ended}
                     for name, second in (("b", 2), ("a", 1))]  # fmt: skip
            return {"items": items, "metadata": {}}

        def log(self, pod, since):
            self.asked += 1
            if pod == "a" and self.asked <= 2:
                raise Unreachable("reset")
            yield f"2026-01-01T00:00:00.1Z {pod}"

    pods = Pods(Server(), SimpleNamespace(start_seconds=1), SimpleNamespace(name="a stage"), queue.SimpleQueue())
    assert [line for line in pods.rest() if line in "ab"] == ["a", "b"]
