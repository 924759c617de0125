"""Training metrics on their way to Prometheus: what is pushed, that nothing waits for it, and that dashboards ask for it."""

import base64
import json
import re
import shutil
import subprocess
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from flows import pushgateway
from tests.unit.stub_server import serving

GRAFANA = Path(__file__).parents[2] / "infra/grafana"
KNOWN = {name for _, name, *_ in pushgateway.SERIES} | {pushgateway.STAGES, "push_time_seconds"}


class Tracker:
    """Stands where MLflow's does."""

    def __init__(self):
        self.told = []

    def start(self, node, parents):
        return Future()

    def progress(self, run, points):
        self.told += points

    def finish(self, run, record):
        self.told.append(record)

    def fail(self, run):
        self.told.append("failed")

    def close(self, failed):
        self.told.append(f"closed, failed: {failed}")

    def address(self, run):
        return {"run_id": "r"}


@pytest.fixture
def gateway():
    """An HTTP server that keeps what it is sent: (url, [(method, path, login, body)])."""
    asked = []

    def keep(one):
        login = base64.b64decode(one.headers.get("Authorization", "Basic ").split()[-1]).decode()
        asked.append((one.method, one.path, login, one.body.decode()))
        return 202, b"", {}

    with serving(keep) as address:
        yield address, asked


def wait_for(asked, count):
    for _ in range(12_000):
        if len(asked) >= count:
            return
        threading.Event().wait(0.01)
    raise AssertionError(asked)


def values(body):
    return {(s.name, s.labels.get("stage") or s.labels["state"]): s.value
            for family in text_string_to_metric_families(body) for s in family.samples}  # fmt: skip


def test_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv("CUVEE_PUSHGATEWAY", raising=False)
    tracker = Tracker()
    assert pushgateway.pushing(tracker, "command_a", "run") is tracker


def test_what_a_stage_tells_is_pushed_and_taken_away_at_the_end(gateway, monkeypatch):
    url, asked = gateway
    monkeypatch.setenv("CUVEE_PUSHGATEWAY", url)
    monkeypatch.setenv("CUVEE_PUSHGATEWAY_AUTH", "cuvee:pass:word")
    monkeypatch.setattr(pushgateway, "EVERY", 0.05)
    inner = Tracker()
    tracker = pushgateway.pushing(inner, "command_a", "run-1")
    run, other = (tracker.start(SimpleNamespace(name=name), {}) for name in ("pretrained", "base"))
    points = [{"step": 1, "time": 0.0, "loss": 9.0}, {"step": 2, "time": 1.0, "loss": 8.5, "peak_memory_gib": 2.0}]
    tracker.progress(run, points)
    wait_for(asked, len(asked) + 2)
    method, path, login, body = asked[-1]
    assert (method, path, login) == ("PUT", "/metrics/job/cuvee/flow_run/run-1", "cuvee:pass:word")
    found = values(body)
    assert found["cuvee_step", "pretrained"] == 2 and found["cuvee_loss", "pretrained"] == 8.5
    assert found["cuvee_peak_memory_bytes", "pretrained"] == 2 * 2**30 and found["cuvee_stages", "running"] == 2
    tracker.finish(run, {"name": "pretrained"})
    tracker.fail(other)
    wait_for(asked, len(asked) + 2)
    found = values(asked[-1][3])
    assert found == {("cuvee_stages", "running"): 0, ("cuvee_stages", "made"): 1, ("cuvee_stages", "failed"): 1}
    assert tracker.address(run) == {"run_id": "r"}
    tracker.close(failed=True)
    assert asked[-1][0] == "DELETE" and asked[-1][1] == "/metrics/job/cuvee/flow_run/run-1"
    assert inner.told == [*points, {"name": "pretrained"}, "failed", "closed, failed: True"]


def test_a_gateway_that_is_down_costs_a_warning(monkeypatch, caplog):
    monkeypatch.setenv("CUVEE_PUSHGATEWAY", "http://127.0.0.1:9")
    monkeypatch.setattr(pushgateway, "EVERY", 0.01)
    tracker = pushgateway.pushing(Tracker(), "command_a", "run")
    for _ in range(12_000):
        if caplog.records:
            break
        threading.Event().wait(0.01)
    threading.Event().wait(0.1)
    tracker.close(failed=False)
    assert len(caplog.records) == 1 and "127.0.0.1:9" in caplog.text


def test_the_trainer_writes_the_series_that_are_pushed():
    """The names come from these files; one that is renamed there would vanish from the dashboard without a word."""
    stages = GRAFANA.parents[1] / "stages"
    text = "".join((stages / file).read_text() for file in ("trainer/meter.py", "trainer/loop.py", "trainer/trainer.py",
                                                            "train/rl.py", "stage.py"))  # fmt: skip
    for key, *_ in pushgateway.SERIES:
        name = key.removeprefix("rollout/")
        assert f'"{name}"' in text or f'"{key}"' in text or f"{name}=" in text, key


def queries():
    dashboard = json.loads((GRAFANA / "training.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]
    for rule in yaml.safe_load((GRAFANA / "alerts.yaml").read_text())["groups"][0]["rules"]:
        yield rule["alert"], rule["expr"]


def test_dashboard_and_alerts_ask_for_what_is_pushed():
    asked = set()
    for title, query in queries():
        names = set(re.findall(r"\b(?:cuvee_\w+|push_time_seconds)", query))
        assert names and names <= KNOWN, f"{title}: {names - KNOWN}"
        asked |= names
        assert set(re.findall(r"(\w+)=~?\"", query)) <= {*pushgateway.LABELS, "state", "job"}, title
    assert asked == KNOWN, f"nobody looks at {KNOWN - asked}"


def test_prometheus_takes_the_rules_and_the_queries(tmp_path):
    if not shutil.which("promtool"):
        pytest.skip("needs promtool (Debian's prometheus)")
    rules = [{"record": f"asked:{at}", "expr": query.replace("$recipe", ".*").replace("$stage", ".*")}
             for at, (_, query) in enumerate(queries()) if not query.startswith("label_values")]  # fmt: skip
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    out = subprocess.run(["promtool", "check", "rules", str(GRAFANA / "alerts.yaml"), str(tmp_path / "queries.yaml")],
                         capture_output=True, text=True)  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr
    config = (GRAFANA / "prometheus.yaml").read_text().replace("/etc/prometheus/alerts.yaml", str(GRAFANA / "alerts.yaml"))
    (tmp_path / "prometheus.yaml").write_text(config)
    out = subprocess.run(["promtool", "check", "config", str(tmp_path / "prometheus.yaml")], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
