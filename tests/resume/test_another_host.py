"""A training run that goes on at other hosts, which share nothing but a bucket: the same bytes as without the move."""

import json
import os
import signal
import time

import boto3
import pytest
from moto.server import ThreadedMotoServer

from stages.run import AGAIN
from stages.store import _bucket, mirror
from stages.store.mirror import Mirror
from tests.resume import test_trainer_parallel as parallel
from tests.resume import trainer_run
from tests.resume.test_trainer_kill import FORKS, finish, outcome, series
from tests.unit.tiny import tokenizer

KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def bucket(monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    name = f"hosts-{time.time_ns()}"  # moto's servers share their buckets
    boto3.session.Session().client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
    yield {"uri": f"s3://{name}/p", "endpoint": endpoint, "fingerprint": "f" * 32}
    server.stop()


def rank_main(rank, world, port, root, words, bucket, broken, options):
    os.environ.update(KEYS)
    os.dup2(os.open(root / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT), 1)
    if rank == broken:
        _bucket.FIRST_SECONDS = mirror.PATIENCE_SECONDS = 0.1
        bucket = bucket | {"uri": "s3://no-such-bucket/p"}
    kept = Mirror(**bucket)
    send = kept.send

    def told(checkpoint, names):
        with open(root / f"sent-{rank}.jsonl", "a") as file:
            file.write(json.dumps([checkpoint.name, names]) + "\n")
        return send(checkpoint, names)

    kept.send = told
    if world > 1:
        return parallel.rank_main(rank, world, port, root, words, mirror=kept, **options)
    trainer_run.run(root, words, mirror=kept, **options)


def host(root, words, bucket, world=1, broken=-1, **options):
    """Exit statuses of the ranks on a host that has what the bucket holds."""
    root.mkdir()
    Mirror(**bucket).pull(root / "scratch")
    port = parallel.port()
    ranks = [FORKS.Process(target=rank_main, args=(r, world, port, root, words, bucket, broken, options)) for r in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
    return [process.exitcode for process in ranks]


def test_three_hosts_make_what_one_makes(tmp_path, bucket):
    words = tokenizer(tmp_path / "words")
    assert finish(tmp_path / "whole", words) == 0
    assert host(tmp_path / "first", words, bucket, stop_at=4) == [AGAIN]  # evicted: it leaves when its checkpoint is safe
    first = Mirror(**bucket).pull(tmp_path / "looked")
    assert first.name == "0000000005"
    assert host(tmp_path / "second", words, bucket, die_at=11) == [-signal.SIGKILL]
    assert host(tmp_path / "third", words, bucket) == [0]
    assert outcome(tmp_path / "third") == outcome(tmp_path / "whole")
    assert series(tmp_path / "third") == series(tmp_path / "whole")
    steps = [p.name for p in sorted((tmp_path / "third/scratch/checkpoints").iterdir())]
    assert steps == ["0000000009", "0000000012"]


def test_every_rank_sends_what_it_wrote(tmp_path, bucket):
    words, options = tokenizer(tmp_path / "words"), {"steps": 8, "distributed_optimizer": True}
    assert parallel.launch(2, tmp_path / "whole", words, **options) == [0, 0]
    assert host(tmp_path / "first", words, bucket, 2, stop_at=4, **options) == [AGAIN] * 2
    sent = [json.loads((tmp_path / f"first/sent-{rank}.jsonl").read_text().splitlines()[-1]) for rank in range(2)]
    assert sent[0][0] == sent[1][0] == "0000000005" and sent[1][1] == ["__1_0.distcp"]
    there = {p.name for p in (tmp_path / "first/scratch/checkpoints/0000000005").iterdir()}
    assert there == {*sent[0][1], *sent[1][1]} and len(there) == len(sent[0][1]) + 1
    assert host(tmp_path / "second", words, bucket, 2, **options) == [0, 0]
    assert outcome(tmp_path / "second") == outcome(tmp_path / "whole")
    assert series(tmp_path / "second") == series(tmp_path / "whole")


def test_what_one_rank_can_not_send_is_no_checkpoint_and_ends_nothing(tmp_path, bucket):
    words = tokenizer(tmp_path / "words")
    assert host(tmp_path / "first", words, bucket, 2, broken=1, steps=8, stop_at=4) == [AGAIN] * 2
    log = (tmp_path / "first/log-1.txt").read_text()
    assert "the checkpoint of step 5 stays on this host: store.uri=s3://no-such-bucket" in log
    assert Mirror(**bucket).pull(tmp_path / "looked") is None
