"""`cuvee up` as people use it: a run from the form in Prefect's UI, its page and MLflow's in a browser; what the server
refuses, who is told of a failure, and cancelling."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from flows.services import experiment_page, free_port
from tests.unit.stub_server import serving

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def told():
    """What was posted to the team's webhook: (its address, [text])."""
    texts = []
    with serving(lambda asked: texts.append(json.loads(asked.body)["text"]) or (200, b"", {})) as address:
        yield f"{address}/hook-with-a-key", texts


@pytest.fixture(scope="module")
def services(tmp_path_factory, told):
    """`cuvee up` in a state directory of its own: (home, address of Prefect, address of MLflow)."""
    home = tmp_path_factory.mktemp("up")
    prefect, mlflow = free_port(), free_port()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "CUVEE_"))}
    env |= {"CUVEE_STATE": str(home / "state"), "PYTHONPATH": str(Path(__file__).parents[2]), "CUVEE_NOTIFY_URL": told[0]}
    up = subprocess.Popen([sys.executable, "-m", "flows.cli", "up", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow)],
                          cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while not (home / "state/services.json").exists():
        assert up.poll() is None and time.monotonic() < deadline, up.stdout.read()
        time.sleep(0.2)
    yield home, f"http://127.0.0.1:{prefect}", f"http://127.0.0.1:{mlflow}"
    up.send_signal(signal.SIGINT)
    up.communicate(timeout=300)
    deadline = time.monotonic() + 60
    while left := below(home):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.fixture
def page(tmp_path):
    from playwright.sync_api import sync_playwright

    if not CHROMIUM:
        pytest.skip("needs Debian's chromium")
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
    page.get_by_text("laptop", exact=True).click()
    page.keyboard.press("ArrowDown")  # opens the list where the click did not
    page.get_by_text("micro", exact=True).click()
    submit, deadline = page.get_by_role("button", name="Submit"), time.monotonic() + 180
    while not (runs := api(prefect, "/flow_runs/filter", {})):
        assert time.monotonic() < deadline
        if submit.is_visible() and submit.is_enabled():  # once more where a busy server answered 503
            submit.click()
        page.wait_for_timeout(2000)
    wanted = {"recipe": "command_a", "scale": "micro", "overrides": [], "until": ["tokens"]}
    assert runs[0]["parameters"] == wanted | {"cluster": "local"}
    assert wait_for_state(prefect, runs[0]["id"], {"COMPLETED"}, 240) == "COMPLETED"
    assert (home / "state/store/aliases/tokens").exists()
    page.goto(f"{prefect}/runs/flow-run/{runs[0]['id']}")
    page.get_by_text("tokenizer").first.wait_for()
    shown = {a["key"]: a["data"] for a in api(prefect, "/artifacts/filter", {}) if a["flow_run_id"] == runs[0]["id"]}
    assert "prompts-code" in shown["plan"] and "10 of 10 stages will run" in shown["plan"]
    link = shown["result"].split("](")[1].split(")")[0]
    page.goto(link)
    page.get_by_text("data.tokens").first.wait_for()
    page.goto(experiment_page(mlflow, "command_a"))
    page.get_by_text("command_a (10 stages)").first.wait_for()
    assert experiment_page(mlflow, "none") == f"{mlflow}/#/experiments?workflowType=machine_learning"


def test_a_misspelt_parameter_is_refused_and_nothing_is_kept_in_the_database(services):
    _, prefect, _ = services
    found = api(prefect, "/deployments/name/cuvee/command-a")
    for parameters, named in (({"overide": ["a=1"]}, "'overide' was unexpected"), ({"scale": "huge"}, "'huge' is not one of")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            api(prefect, f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})
        assert refused.value.code == 409 and named in refused.value.read().decode()
    assert found["job_variables"] == {} and found["tags"] == ["cuvee", "command_a"] and found["description"]


def test_the_team_is_told_of_a_failure(services, told):
    home, prefect, _ = services
    url, texts = told
    body = {"parameters": {"scale": "micro", "overrides": ["pretrain.lrr=1"]}}
    run = api(prefect, f"/deployments/{deployment(prefect, 'command-a')}/create_flow_run", body)["id"]
    deadline = time.monotonic() + 240
    while not texts:
        assert time.monotonic() < deadline, api(prefect, f"/flow_runs/{run}")["state"]
        time.sleep(0.3)
    assert "of command-a: Failed" in texts[0] and "pretrain.lrr: 'lrr' is not known; did you mean 'lr'?" in texts[0]
    assert f"{prefect}/runs/flow-run/{run}" in texts[0] and len(texts) == 1
    block = next(b for b in api(prefect, "/block_documents/filter", {}) if b["name"] == "cuvee-run-failed")
    assert "hook-with-a-key" not in json.dumps(block)
    for path in (home / "state").rglob("*.db"):
        assert b"hook-with-a-key" not in path.read_bytes(), path


def test_a_run_of_the_command_line_that_is_killed_is_crashed_and_told_of(services, told):
    home, prefect, _ = services
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "CUVEE_"))}
    env |= {"CUVEE_STATE": str(home / "state"), "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.Popen([sys.executable, "-m", "flows.cli", "run", "scale=micro", "tokenizer.vocab_size=900", "--until", "tokens"],
                           cwd=home, env=env, stdout=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 240
    while not (notes := list((home / "state/runs").glob("*.json"))):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    run.kill()
    run.wait()
    found = api(prefect, f"/flow_runs/{notes[0].stem}")
    while found["state"]["type"] != "CRASHED" or not any("Crashed. its process died" in text for text in told[1]):
        assert time.monotonic() < deadline, found["state"]
        time.sleep(0.5)
        found = api(prefect, f"/flow_runs/{notes[0].stem}")
    assert found["name"] == "command_a micro local" and set(found["tags"]) == {"cuvee", "command_a"}


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
    wait_for_state(prefect, run, {"CANCELLED"}, 240)
    deadline = time.monotonic() + 120
    while workers := [c for c in below(home) if "stages.worker" in c]:
        assert time.monotonic() < deadline, workers
        time.sleep(0.2)
