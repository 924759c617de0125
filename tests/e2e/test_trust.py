"""Whole runs through a bucket that are killed again and again; then: no half, double or repeated artifact, and no secret
in anything that was written or said. The long version is infra/bench/chaos.py."""

import os

import boto3

from infra.bench.chaos import Chaos, secrets_left

CANARIES = {name: f"canary-{at}" for at, name in enumerate((
    "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_KEY", "PGPASSWORD", "TEACHER_KEY",
    "CUVEE_PUSHGATEWAY_AUTH"))}  # fmt: skip
RECIPE = ("scale=micro", "recipe.experts=[math]", "--until", "pretrained")


def test_runs_that_are_killed_finish_whole_and_tell_no_secret(tmp_path, monkeypatch):
    for name in ("CUVEE_STATE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # what it sets ends with the test
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    chaos = Chaos(tmp_path, 1, RECIPE, (1, 4), ("stage", "worker", "run", "network to the bucket"), False, CANARIES)
    try:
        tally = chaos.run(4)
        assert tally.faults == 0, tally
        assert len(tally.kills) == 4 and tally.artifacts >= 5, tally
        client = boto3.session.Session().client("s3", endpoint_url=chaos.upstream)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="chaos")
        objects = {item["Key"]: client.get_object(Bucket="chaos", Key=item["Key"])["Body"].read()
                   for page in pages for item in page["Contents"]}
    finally:
        chaos.close()
    assert (chaos.state / "tracking").exists()  # what MLflow will be told
    for secret in ("canary", chaos.keys["AWS_SECRET_ACCESS_KEY"]):
        assert secrets_left(tmp_path, secret) == []
        assert [name for name, body in objects.items() if secret.encode() in body] == []
