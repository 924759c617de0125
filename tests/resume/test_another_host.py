"""A training run that goes on at other hosts, which share nothing but a bucket: the same bytes as without the move."""

import os
import signal

import boto3
import pytest
from moto.server import ThreadedMotoServer

from stages.run import AGAIN
from stages.store.mirror import Mirror
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
    boto3.session.Session().client("s3", endpoint_url=endpoint).create_bucket(Bucket="hosts")
    yield {"uri": "s3://hosts/p", "endpoint": endpoint, "fingerprint": "f" * 32}
    server.stop()


def host(root, words, bucket, options):
    os.environ.update(KEYS)
    Mirror(**bucket).pull(root / "scratch")
    trainer_run.run(root, words, mirror=Mirror(**bucket), **options)


def run(*args, **options):
    process = FORKS.Process(target=host, args=(*args, options))
    process.start()
    process.join(120)
    return process.exitcode


def test_three_hosts_make_what_one_makes(tmp_path, bucket):
    words = tokenizer(tmp_path / "words")
    assert finish(tmp_path / "whole", words) == 0
    assert run(tmp_path / "first", words, bucket, stop_at=4) == AGAIN  # evicted: it leaves when its checkpoint is safe
    first = Mirror(**bucket).pull(tmp_path / "looked")
    assert first.name == "0000000005"
    assert run(tmp_path / "second", words, bucket, die_at=11) == -signal.SIGKILL
    assert run(tmp_path / "third", words, bucket) == 0
    assert outcome(tmp_path / "third") == outcome(tmp_path / "whole")
    assert series(tmp_path / "third") == series(tmp_path / "whole")
    steps = [p.name for p in sorted((tmp_path / "third/scratch/checkpoints").iterdir())]
    assert steps == ["0000000009", "0000000012"]
