"""A person in a browser: start a run from the form in Prefect's UI, open MLflow; and cancel a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from flows.services import free_port

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    """`cuvee up` in a state directory of its own: (home, address of Prefect, address of MLflow)."""
    home = tmp_path_factory.mktemp("up")
    prefect, mlflow = free_port(), free_port()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "CUVEE_"))}
    env |= {"CUVEE_STATE": str(home / "state"), "PYTHONPATH": str(Path(__file__).parents[2])}
    up = subprocess.Popen([sys.executable, "-m", "flows.cli", "up", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow)],
                          cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while not (home / "state/services.json").exists():
        assert up.poll() is None and time.monotonic() < deadline, up.stdout.read()
        time.sleep(0.2)
    yield home, f"http://127.0.0.1:{prefect}", f"http://127.0.0.1:{mlflow}"
    up.send_signal(signal.SIGINT)
    up.communicate(timeout=60)
    assert below(home) == []


@pytest.fixture
def page(tmp_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        shots = os.environ.get("CUVEE_SCREENSHOTS")
        if shots:
            page.screenshot(path=f"{shots}/{time.time_ns()}.png")
        browser.close()


def below(home):
    """Processes that work for this state directory."""
    found = []
    for process in psutil.process_iter(["environ"]):
        try:
            if (process.info["environ"] or {}).get("CUVEE_STATE") == str(home / "state") and process.status() != "zombie":
                found.append(process.cmdline())
        except psutil.Error:
            pass
    return found


def api(prefect, path, body=None):
    request = urllib.request.Request(f"{prefect}/api{path}", json.dumps(body or {}).encode() if body is not None else None,
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())


def deployment(prefect, name):
    return api(prefect, f"/deployments/name/cuvee/{name}")["id"]


def wait_for_state(prefect, run, states, seconds):
    deadline = time.monotonic() + seconds
    while (state := api(prefect, f"/flow_runs/{run}")["state"]["type"]) not in states:
        assert time.monotonic() < deadline and state not in ("FAILED", "CRASHED"), state
        time.sleep(0.3)
    return state


def test_a_run_from_the_form_then_mlflow(services, page):
    home, prefect, mlflow = services
    page.goto(f"{prefect}/deployments/deployment/{deployment(prefect, 'command-a-tokens')}/run")
    page.get_by_role("button", name="Add item").first.click()
    page.wait_for_function("document.querySelectorAll('textarea').length === 2")
    page.locator("textarea").first.fill("scale=micro")  # the new item of `overrides`, which comes before `until`
    page.get_by_role("button", name="Submit").click()
    deadline = time.monotonic() + 60
    while not (runs := api(prefect, "/flow_runs/filter", {})):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert runs[0]["parameters"] == {"overrides": ["scale=micro"], "until": ["tokens"]}
    assert wait_for_state(prefect, runs[0]["id"], {"COMPLETED"}, 240) == "COMPLETED"
    assert (home / "state/store/aliases/tokens").exists()
    page.goto(f"{prefect}/runs/flow-run/{runs[0]['id']}")
    page.get_by_text("tokenizer").first.wait_for()
    page.goto(mlflow)
    page.get_by_text("command_a").first.wait_for()


def test_cancelling_in_prefect_ends_the_processes(services):
    home, prefect, _ = services
    body = {"parameters": {"overrides": ["scale=micro", "pretrain.steps=2000"], "until": ["pretrained"]}}
    run = api(prefect, f"/deployments/{deployment(prefect, 'command-a')}/create_flow_run", body)["id"]
    deadline = time.monotonic() + 240
    while not any((home / "state").glob("work/*/scratch/checkpoints/*")):
        state = api(prefect, f"/flow_runs/{run}")["state"]
        assert time.monotonic() < deadline and state["type"] not in ("FAILED", "CRASHED"), state["message"]
        time.sleep(0.1)
    api(prefect, f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    wait_for_state(prefect, run, {"CANCELLED"}, 60)
    deadline = time.monotonic() + 30
    while workers := [c for c in below(home) if "stages.worker" in c]:
        assert time.monotonic() < deadline, workers
        time.sleep(0.2)
