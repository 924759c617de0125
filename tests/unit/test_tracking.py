"""The tracker before an MLflow that is there, goes away, or was never there."""

import shutil
import threading
import time
from types import SimpleNamespace

import mlflow
import pytest
from werkzeug.serving import make_server

from flows import _mlflow, services, tracking
from flows.graph import Node
from stages import stage as stages
from stages.store import record as records
from tests.s3.proxy import DOWN, LOST_ANSWER, Proxy

CONF = SimpleNamespace(recipe=SimpleNamespace(name="a_recipe", registered=["base"]))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A new database of MLflow's."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(template, tmp_path):
    return lambda name: shutil.copy(template, tmp_path / name)


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("CUVEE_STATE", str(tmp_path))
    for name, value in services.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.2)
    yield tmp_path
    mlflow.set_tracking_uri(None)


def node(name, kind_of, **inputs):
    return Node(name, kind_of, stages.load(kind_of).Config(), inputs)


CORPUS = node("corpus", "data.curate")
TOKENIZER = node("tokenizer", "data.tokenizer", corpus=CORPUS)
MODEL = node("base", "merge.soup", models={"only": node("only", "train.pretrain", tokens=CORPUS)})  # a checkpoint


def published(made, tracker, run, **series):
    return records.seal({
        "fingerprint": made.fingerprint, "name": made.name, "inputs": {}, "metrics": {"loss": 1.0}, "series": series,
        "ended": "2026-01-01T00:00:00.000+00:00", "seconds": 1.0, "mlflow": tracker.address(run)})


def steps(first, last):
    return [{"step": step, "time": 1.7e9 + step, "loss": 1.0 / step} for step in range(first, last + 1)]


def runs(uri):
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("a_recipe").experiment_id
    return client, {run.info.run_name: run for run in client.search_runs([experiment])}, len(client.search_runs([experiment]))


@pytest.fixture
def server(state, database, monkeypatch):
    """MLflow's own server, on SQLite: (its address, the database's)."""
    from mlflow.server import app, handlers

    uri = f"sqlite:///{database('server.db')}"
    for name, value in {"_MLFLOW_SERVER_FILE_STORE": uri, "_MLFLOW_SERVER_ARTIFACT_ROOT": (state / "files").as_uri()}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(handlers, "_tracking_store", None)  # another test's
    http = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", uri
    http.shutdown()
    http.server_close()


def test_a_server_that_is_gone_for_a_while_loses_nothing_and_holds_nothing_up(state, server, monkeypatch):
    down, ends, lost = threading.Event(), threading.Event(), iter([LOST_ANSWER])

    def fault(method, path):
        if down.is_set():
            return DOWN
        return next(lost, "") if path.endswith("runs/create") and ends.is_set() else ""

    with Proxy(server[0], fault) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.endpoint)
        tracker = tracking.Tracker(CONF, "flow-1", 2)
        corpus = tracker.start(CORPUS, {})
        tracker.progress(corpus, steps(1, 5))
        first = published(CORPUS, tracker, corpus)
        assert first["mlflow"]["run_id"]
        down.set()
        tracker.progress(corpus, steps(6, 10))
        deadline = time.monotonic() + 60
        while not tracker._down:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        began = time.monotonic()
        tokenizer = tracker.start(TOKENIZER, {CORPUS.fingerprint: first})
        second = published(TOKENIZER, tracker, tokenizer)
        tracker.finish(corpus, first)
        tracker.finish(tokenizer, second)
        assert second["mlflow"] is None and time.monotonic() - began < tracking.ADDRESS_SECONDS / 2
        ends.set()
        down.clear()
        tracker.close(failed=False)
        assert {happened for *_, happened in proxy.seen} >= {DOWN, LOST_ANSWER}
    client, found, count = runs(server[1])
    assert count == 3 and {run.info.status for run in found.values()} == {"FINISHED"}
    history = client.get_metric_history(found["corpus"].info.run_id, "loss")
    assert sorted({point.step for point in history}) == list(range(1, 11))
    assert found["tokenizer"].data.tags["mlflow.parentRunId"] == found["a_recipe (2 stages)"].info.run_id
    assert "corpus" in found["tokenizer"].data.tags["mlflow.note.content"]
    assert not list((state / "tracking").iterdir())


def test_what_a_run_could_not_tell_the_next_one_tells_once(state, database, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:canary-7731@127.0.0.1:{services.free_port()}")
    tracker = tracking.Tracker(CONF, "flow-1", 3)
    run = tracker.start(MODEL, {parent.fingerprint: {"name": parent.name, "fingerprint": parent.fingerprint,
                                                     "digest": "0" * 64} for parent in MODEL.parents})
    tracker._down = True
    record = published(MODEL, tracker, run, loss=[[1, 2.0], [2, 1.0]])
    tracker.finish(run, record)
    killed = tracker.start(CORPUS, {})
    tracker.progress(killed, steps(1, 3))
    tracker.close(failed=True)
    assert "is kept in" in caplog.text and "canary-7731" not in caplog.text
    (journal,) = (state / "tracking").glob("*.jsonl")
    with open(journal, "ab") as file:
        file.write(b'{"do": "of another version", "run": "' + run.id.encode() + b'"}\n')
        file.write(b'{"do": "metrics", "run": "cut o')  # by a kill
    uri = f"sqlite:///{database('other.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracking.deliver_left()
    assert "MLflow refuses to of another version" in caplog.text
    tracking.deliver_left()
    client, found, count = runs(uri)
    assert count == 3 and found["base"].info.status == "FINISHED" and found["corpus"].info.status == "KILLED"
    assert found["a_recipe (3 stages)"].info.status == "FAILED"
    version = client.get_model_version_by_alias("cuvee-a-recipe", "base")
    assert version.run_id == found["base"].info.run_id and version.version == "1" or version.version == 1
    assert len(client.get_metric_history(found["corpus"].info.run_id, "loss")) == 3
    assert not list((state / "tracking").glob("*"))


def test_an_operation_whose_answer_was_lost_is_not_done_twice(database, monkeypatch):
    uri = f"sqlite:///{database('mlflow.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    done = tracking.Mlflow({})
    operations = [{"do": "open", "run": "flow", "recipe": "a_recipe", "flow_run": "f", "attempt": "a", "title": "t"},
                  {"do": "start", "run": "r", "node": tracking.described(MODEL, {p.fingerprint: {
                      "name": p.name, "fingerprint": p.fingerprint, "digest": "0" * 64} for p in MODEL.parents})}]
    for operation in operations:
        assert done.do(operation, again=False) == done.do(operation, again=True)
    record = records.seal({"fingerprint": MODEL.fingerprint, "name": "base", "inputs": {}, "metrics": {}, "series": {},
                           "ended": "2026-01-01T00:00:00.000+00:00", "seconds": 1.0})
    for again in (False, True):
        done.do({"do": "table", "run": "r", "columns": {"prompt": ["Hi", "Ho"], "reward": [1.0, 0.0]}}, again)
        done.do({"do": "finish", "run": "r", "record": record, "registered": True}, again)
    client, _, count = runs(uri)
    table = mlflow.load_table("samples.json", run_ids=[done.results["r"]["run_id"]])
    assert table.to_dict("list") == {"prompt": ["Hi", "Ho"], "reward": [1.0, 0.0]}
    assert count == 2 and len(client.search_model_versions("name = 'cuvee-a-recipe'")) == 1


def test_a_living_runs_journal_is_left_alone(state):
    journal = tracking.Journal(state / "tracking" / "living.jsonl")
    assert list(tracking.left()) == []
    journal.close()
    assert [one.path.name for one in tracking.left()] == ["living.jsonl"]


def test_a_database_is_whole_or_not_there(state, template, monkeypatch):
    """Killed in MLflow's first migration, which can't be gone on with."""
    path, whole = state / "mlflow.db", mlflow.MlflowClient.search_experiments

    def killed(client, **options):
        whole(client, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, "search_experiments", killed)
        with pytest.raises(KeyboardInterrupt):
            _mlflow.make_database()
    assert not list(state.iterdir())
    _mlflow.make_database()
    made = path.stat()
    _mlflow.make_database()
    assert path.stat().st_mtime_ns == made.st_mtime_ns and [one.name for one in state.iterdir()] == ["mlflow.db"]
    assert mlflow.MlflowClient(f"sqlite:///{path}").create_experiment("x")
