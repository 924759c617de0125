"""What happens to objects and in containers, however often the connection breaks: list, watch, list again after expiry."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

from flows.launchers._kubernetes_api import GONE, NOT_FOUND, Api, Refused, Unreachable

PATIENCE = 15.0  # seconds between two tries, at most
LAST_TRIES = 5


def follow(
    api: Api, kind: str, selectors: dict[str, str], changed: Callable[[str, dict[str, Any] | None], None],
    stop: threading.Event, log: Callable[[str], None],
) -> None:  # fmt: skip
    """Call `changed(name, object or None once it is gone)` for each object as it is and after every change, until `stop`.

    Never raises while the server can be asked again; Refused where it says no (a right that was taken away).
    """
    known: set[str] = set()
    wait = 0.5
    while not stop.is_set():
        try:
            listing = api.list(kind, **selectors)
            now = {item["metadata"]["name"]: item for item in listing["items"]}
            for name in known - now.keys():
                changed(name, None)
            for name, item in now.items():
                changed(name, item)
            known = set(now)
            _watch(api, kind, selectors, listing["metadata"]["resourceVersion"], known, changed, stop)
            wait = 0.5
        except (Refused, Unreachable) as error:
            if isinstance(error, Refused) and error.status in (401, 403):
                raise
            if not (isinstance(error, Refused) and error.status == GONE):
                log(f"{error}; asking again")
                stop.wait(wait)
                wait = min(2 * wait, PATIENCE)


def _watch(
    api: Api, kind: str, selectors: dict[str, str], version: str, known: set[str],
    changed: Callable[[str, dict[str, Any] | None], None], stop: threading.Event,
) -> None:  # fmt: skip
    """From `version` on, watch after watch, until one fails: with GONE when the server has forgotten that version."""
    while not stop.is_set():
        for event in api.events(kind, version, **selectors):
            item = event["object"]
            version = item["metadata"]["resourceVersion"]
            if event["type"] == "BOOKMARK":
                continue
            name = item["metadata"]["name"]
            gone = event["type"] == "DELETED"
            known.discard(name) if gone else known.add(name)
            changed(name, None if gone else item)
            if stop.is_set():
                return


def follow_log(api: Api, pod: str, ended: Callable[[], bool], line: Callable[[str], None], stop: threading.Event) -> None:
    """Every line of a pod's container once, in order, until it has `ended`; attached again where it breaks off.

    What an ended container has said is asked for LAST_TRIES times: the node that has it may be gone for good.
    """
    last, since, wait, tries = "", "", 0.2, LAST_TRIES
    while not stop.is_set() and tries:
        over = ended()  # asked before reading: what follows is then the whole rest
        tries -= over
        try:
            for text in api.log(pod, since):
                stamp, _, text = text.partition(" ")
                if (at := _fixed(stamp)) > last:
                    last, since, wait = at, re.sub(r"\.\d+", "", stamp), 0.2
                    line(text)
            if over:
                return
        except Refused as error:
            if error.status == NOT_FOUND:
                return
        except Unreachable:
            pass
        stop.wait(wait)
        wait = min(2 * wait, PATIENCE)


def _fixed(stamp: str) -> str:
    """RFC 3339 with nine digits of a second, so that stamps of one clock sort as text."""
    found = re.match(r"([^.Z+]+)(?:\.(\d+))?", stamp)
    return f"{found[1]}.{(found[2] or '').ljust(9, '0')}" if found else stamp


class Patience:
    """Something is true for so many seconds without a break."""

    def __init__(self, seconds: float):
        self.seconds, self.since = seconds, {}

    def over(self, name: str, true: bool) -> bool:
        if not true:
            self.since.pop(name, None)
            return False
        return time.monotonic() - self.since.setdefault(name, time.monotonic()) >= self.seconds
