"""The store before two servers over HTTP: Ceph's radosgw (where Debian's packages are installed) and moto."""

import time

import boto3
import pytest
from moto.server import ThreadedMotoServer

from stages.store import _bucket, s3
from stages.store.s3 import S3Store
from tests.s3 import ceph


@pytest.fixture(scope="session")
def radosgw(tmp_path_factory):
    if why := ceph.missing():
        pytest.skip(why)
    server = ceph.Ceph(tmp_path_factory.mktemp("ceph"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def moto():
    server = ThreadedMotoServer(port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(params=["radosgw", "moto"])
def endpoint(request, monkeypatch):
    """The address of the server; credentials for it are in the environment."""
    server = request.getfixturevalue(request.param)
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (keys if isinstance(server, str) else server.environment()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    return server if isinstance(server, str) else server.endpoint


@pytest.fixture
def uri(endpoint):
    """An empty prefix of a bucket of its own."""
    bucket = f"bucket-{time.time_ns()}"
    boto3.session.Session().client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
    return f"s3://{bucket}/some/prefix"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Attempts follow at once. Parts are as small as a service takes them."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.05)
    monkeypatch.setattr(_bucket, "PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(_bucket, "FIRST_SECONDS", 1.0)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 1024 * 1024)


@pytest.fixture
def store(uri, endpoint, tmp_path):
    return S3Store(uri, tmp_path / "cache", endpoint)
