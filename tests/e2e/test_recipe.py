"""The whole recipe at scale=micro through the command line, as a user runs it; then what must hold afterwards.

The tests of this module share one run and build on each other, in this order.
"""

import base64
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra.bench.chaos import secrets_left
from tests.unit.stub_server import serving

# What no file may show; the servers of these runs ask for none of them.
SECRETS = {name: f"canary-7f3a-{at}" for at, name in enumerate((
    "HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD",
    "PREFECT_API_KEY", "TEACHER_KEY", "PGPASSWORD"))}  # fmt: skip
EXPERTS = "recipe.experts=[math,safety]"  # two experts: the same graph, narrower


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("recipe")


def command(*args):
    return [sys.executable, "-m", "flows.cli", *args]


def environment(home, state="state"):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "CUVEE_"))}
    return inherited | SECRETS | {"CUVEE_STATE": str(home / state), "PYTHONPATH": str(Path(__file__).parents[2])}


def cuvee(home, *args, state="state", check=True):
    done = subprocess.run(command(*args), cwd=home, env=environment(home, state), capture_output=True, text=True, timeout=3600)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def records(home, state="state"):
    store = home / state / "store"
    return {alias.name: json.loads((store / "artifacts" / alias.read_text() / "record.json").read_text())
            for alias in (store / "aliases").iterdir()}


def test_the_whole_recipe(home):
    out = cuvee(home, "run", "scale=micro").stdout
    made = records(home)
    assert len(made) == 73 and "73 of 73 stages to make" in out
    assert [p.name for p in home.iterdir()] == ["state"]  # nothing is left beside the state directory
    for line in ("polished", "cuvee chat polished", "report.html", "mlflow", "prefect"):
        assert line in out
    export = made["export"]
    assert export["metrics"]["max_abs_difference"] <= 1e-4 < export["metrics"]["longest"] > export["metrics"]["sliding_window"]
    page = (home / "state/store/artifacts" / made["report"]["fingerprint"] / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']https?://""", page) and "polished" in page


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
def test_the_report_opens_in_a_browser_without_a_network(home):
    from playwright.sync_api import sync_playwright

    folder = home / "state/store/artifacts" / records(home)["report"]["fingerprint"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"),
                                       args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        page = browser.new_context(offline=True).new_page()
        problems, asked = [], []
        page.on("pageerror", lambda error: problems.append(error))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((folder / "report.html").as_uri())
        assert page.get_by_text("Every model on every domain").is_visible() and page.locator("svg").count() > 3
        assert problems == [] and [url for url in asked if not url.startswith(("file:", "data:"))] == []
        browser.close()


def test_a_second_run_does_nothing_and_says_so(home):
    before, spent = records(home), resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "nothing to do" in cuvee(home, "run", "scale=micro").stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime < 30 and records(home) == before
    assert cuvee(home, "plan", "scale=micro").stdout.rstrip().endswith("nothing will run")


def test_no_secret_of_the_environment_is_written_or_said(home):
    """In records, logs, the report, Prefect's and MLflow's databases and files, and the plan."""
    said = "".join(cuvee(home, "plan", "scale=micro", *changed).stdout for changed in ([], ["expert.math.sft.lr=0.5"]))
    for secret in ("canary-7f3a", *(base64.b64encode(value.encode()).decode().rstrip("=") for value in SECRETS.values())):
        assert secret not in said and secrets_left(home, secret) == []
    assert secrets_left(home, records(home)["report"]["fingerprint"])  # it does find what is there


def test_the_exported_model_is_transformers_own(home):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = home / "state/store/artifacts" / records(home)["export"]["fingerprint"]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "How many?"}], add_generation_prompt=True, return_tensors="pt")
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    assert model(ids).logits.shape == (1, ids.shape[1], model.config.vocab_size)


def test_mlflow_has_a_run_an_artifact_linked_to_its_inputs(home):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{home / 'state/mlflow.db'}")
    made = records(home)
    run = client.get_run(made["polished"]["mlflow"]["run_id"])
    assert run.data.tags["cuvee.fingerprint"] == made["polished"]["fingerprint"]
    assert run.info.status == "FINISHED" and run.data.params["skip"] == "6"
    assert made["preference-2"]["mlflow"]["model_id"] in {m.model_id for m in run.inputs.model_inputs}
    assert made["polished"]["mlflow"]["model_id"] in {m.model_id for m in run.outputs.model_outputs}
    assert len(client.get_metric_history(made["pretrained"]["mlflow"]["run_id"], "loss")) >= 12
    version = client.get_model_version_by_alias("cuvee-command-a", "polished")
    assert version.tags["cuvee.fingerprint"] == made["polished"]["fingerprint"]
    parents = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.data.tags['mlflow.parentRunId']}'")
    assert len(parents) == 73


def test_plan_names_what_a_changed_learning_rate_remakes(home):
    lines = cuvee(home, "plan", "scale=micro", "expert.math.sft.lr=0.5").stdout.splitlines()
    runs = {line.split()[0]: line for line in lines if len(line.split()) > 2 and line.split()[2] == "run"}
    assert "lr: 0.002 -> 0.5" in runs["sft-math"] and "rl-code" in runs and "report" in runs
    assert not {"sft-code", "instruct", "corpus", "base"} & runs.keys()


def test_why_diff_verify(home):
    assert "corpus" in cuvee(home, "why", "polished").stdout
    assert "config.objective" in cuvee(home, "diff", "rl-safety", "rl-math").stdout
    assert "all intact" in cuvee(home, "verify", "report").stdout
    corpus = home / "state/store/artifacts" / records(home)["corpus"]["fingerprint"] / "table.json"
    data = corpus.read_bytes()
    corpus.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    found = cuvee(home, "verify", "polished", check=False)
    assert found.returncode == 1 and "corpus" in found.stdout and "table.json was changed" in found.stdout
    corpus.write_bytes(data)
    unknown = cuvee(home, "why", "polishd", check=False)
    assert unknown.returncode == 2 and "did you mean 'polished'" in unknown.stderr


def test_a_model_talks(home):
    done = subprocess.run(command("chat", "polished"), cwd=home, env=environment(home), input="How many?\n/quit\n",
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    refused = cuvee(home, "chat", "corpus", check=False)
    assert refused.returncode == 2 and "not a model" in refused.stderr


def run_in_background(home, state, *args):
    # A session of its own, so that a kill of the group can't reach the test.
    return subprocess.Popen(command("run", *args), cwd=home, env=environment(home, state), start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, seconds, process):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def checkpoint_of(state):
    """A condition: some training stage has committed a checkpoint to resume from."""
    return lambda: any(state.glob("work/*/scratch/checkpoints/*"))


def below(state):
    """Processes that work for this state directory."""
    found = []
    for process in psutil.process_iter(["pid", "environ"]):
        try:
            if (process.info["environ"] or {}).get("CUVEE_STATE") == str(state) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


def test_kill_9_then_the_same_bytes(home):
    """Killed twice during pretraining; finished stages stay, training goes on, and the result is the uninterrupted one."""
    recipe = ("scale=micro", "pretrain.save_every=1", "--until", "pretrained")  # so that no kill comes after the last save
    state, whole = home / "killed", records(home)["pretrained"]
    shutil.copytree(home / "state/store", state / "store")  # the data stages are made; pretraining is not
    shutil.rmtree(state / "store/artifacts" / whole["fingerprint"])
    for _ in range(2):
        process = run_in_background(home, "killed", *recipe)
        saved = set(state.glob("work/*/scratch/checkpoints/*"))
        wait_until(lambda: set(state.glob("work/*/scratch/checkpoints/*")) - saved, 600, process)  # noqa: B023
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 120
        while below(state) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert below(state) == []  # worker, stage and server have followed
    out = cuvee(home, "run", *recipe, state="killed").stdout
    assert "1 of 11 stages to make" in out
    log = next((state / "work").glob("*/log.txt")).read_text()
    assert "resumed after step" in log
    resumed = records(home, "killed")["pretrained"]
    assert whole["files"] == resumed["files"] and whole["fingerprint"] == resumed["fingerprint"]
    assert whole["series"]["loss"] == resumed["series"]["loss"]


def test_prefect_knows_that_the_killed_runs_died(home):
    import sqlite3

    with sqlite3.connect(home / "killed/prefect/prefect.db") as database:
        states = [row[0] for row in database.execute("select state_type from flow_run order by created")]
    assert states.count("CRASHED") == 2 and states[-1] == "COMPLETED" and "RUNNING" not in states


def test_ctrl_c_is_one_sentence_and_leaves_nothing_running(home):
    state = home / "killed"  # all that is still to be made is another pretraining
    process = run_in_background(home, "killed", "scale=micro", "pretrain.steps=2000", "--until", "pretrained")
    wait_until(checkpoint_of(state), 600, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130 and "interrupted; what was finished is kept" in error and "Traceback" not in error
    assert below(state) == []
    assert not (state / "store/leases").exists() or not list((state / "store/leases").iterdir())


@pytest.mark.parametrize("override, sentence", [
    ("data.sources=[/nowhere/at/all]", "/nowhere/at/all"),
    ("data.sources=[empty]", "empty"),
    ("store.uri=/proc/nowhere", "folder that you may write"),
])
def test_bad_input_is_one_sentence(home, override, sentence):
    (home / "empty").mkdir(exist_ok=True)
    done = cuvee(home, "run", "scale=micro", override, EXPERTS, state="bad", check=False)
    assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def server():
    """(address, bodies asked) of `good`, which solves the stories, and of `endless`, which is cut off in a turn that it never ends."""
    bodies = []

    def answer(asked):
        body = json.loads(asked.body)
        bodies.append(body)
        story = body["messages"][-1]["content"]
        a, b = map(int, re.findall(r"\d+", story))
        good, less = body["model"] == "good", re.search("loses|gives away|sells|breaks|takes", story)
        text = f"That makes {a - b if less else a + b}" if good else "apples " * body["max_tokens"]
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop" if good else "length"}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": 50, "completion_tokens": 4}}, {}

    with serving(answer) as address:
        yield address, bodies


def test_instruct_learns_the_best_answers_of_teachers(home, server):
    address, asked = server
    model = "{name}: {{model: {name}, url: {address}/v1, max_tokens: 16, output_price: 10.0}}"
    teachers = ", ".join(model.format(name=name, address=address) for name in ("good", "endless"))
    out = cuvee(home, "run", "scale=micro", "synthetic.prompts=12", "synthetic.mix={math: 1.0}",
                f"synthetic.teachers={{{teachers}}}", "--until", "instruct").stdout  # fmt: skip
    assert "2 of 14 stages to make" in out
    made = records(home)
    own, folder = made["synthetic"], home / "state/store/artifacts" / made["synthetic"]["fingerprint"]
    assert own["metrics"]["conversations"] == 12 and own["metrics"]["chosen/good"] == 1.0 and own["metrics"]["reward"] == 1.0
    assert own["metrics"]["cut_off"] == 0.5, "the answers of `endless`, which nothing learns from"
    assert own["metrics"]["cost"] == pytest.approx(24 * 4 * 10 / 1e6)
    rows = [json.loads(line) for line in open(folder / "train.jsonl")]
    assert len(rows) == 12 and all(row["messages"][-1]["content"].startswith("That makes ") and row["teacher"] == "good" for row in rows)
    assert made["instruct"]["inputs"]["conversations"]["synthetic"]["fingerprint"] == own["fingerprint"]
    assert len(asked) == 24
