"""What the store promises, with the faults of networks and servers between it and the bucket."""

import datetime
import hashlib
import json
import os
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import boto3
import botocore.auth
import botocore.compat
import pytest

from flows import lineage
from stages.stage import CuveeError
from stages.store import _bucket, mirror, s3
from stages.store import record as records
from stages.store._bucket import Bucket
from stages.store.s3 import S3Store
from tests.s3.proxy import (
    BUSY,
    CUT_ANSWER,
    CUT_REQUEST,
    DOWN,
    ERROR,
    FLIP,
    IGNORE,
    LOST_ANSWER,
    SLOW,
    Proxy,
    every_second,
)
from tests.unit.test_store import make


def artifact(folder, seed=0, size=11_000_000, name="base"):
    """(folder of files, record) of an artifact whose bytes are a function of the seed."""
    out = folder / "out"
    (out / "sub").mkdir(parents=True)
    (out / "big.bin").write_bytes(hashlib.shake_128(str(seed).encode()).digest(size))
    (out / "sub" / "small.txt").write_text("weights")
    config = {"seed": 0}
    return out, {"fingerprint": records.fingerprint("x.y", "1", config, {}, {}), "name": name, "kind": "checkpoint",
                 "stage": "x.y", "version": "1", "config": config, "external": {}, "inputs": {}, "seed": seed,
                 "files": records.digest_files(out), "metrics": {}, "ended": "2026-01-01T00:00:00.000+00:00", "seconds": 1.0}


@pytest.mark.parametrize("fault", [ERROR, BUSY, SLOW, CUT_REQUEST, LOST_ANSWER, DOWN])
def test_published_whole_whatever_happens_to_the_requests(uri, endpoint, tmp_path, fault):
    with Proxy(endpoint, every_second(fault, "PUT", "POST")) as proxy:
        store = S3Store(uri, tmp_path / "cache", proxy.endpoint)
        out, record = artifact(tmp_path)
        with store.lease(record["fingerprint"]):
            assert store.publish(out, record) == records.seal(record)
        assert sum(happened == fault for *_, happened in proxy.seen) >= 3
    reader = S3Store(uri, tmp_path / "other", endpoint)
    assert list(lineage.verify(reader, reader.record(record["fingerprint"]))) == []
    assert records.digest_files(reader.fetch(record["fingerprint"])) == record["files"]
    assert [name for name, _ in reader.bucket.names("leases/")] == []


@pytest.mark.parametrize("fault", [ERROR, CUT_ANSWER, DOWN, FLIP])
def test_fetched_whole_whatever_happens_to_the_answers(store, uri, endpoint, tmp_path, fault):
    out, record = artifact(tmp_path)
    store.publish(out, record)
    hits = iter(range(100))

    def decide(method, path):
        return fault if method == "GET" and "big.bin" in path and next(hits) == 0 else ""

    with Proxy(endpoint, decide) as proxy:
        reader = S3Store(uri, tmp_path / "other", proxy.endpoint)
        assert records.digest_files(reader.fetch(record["fingerprint"])) == record["files"]
        assert any(happened == fault for *_, happened in proxy.seen)
    assert not [path for path in (tmp_path / "other").rglob(".big*")]


def test_what_arrives_changed_every_time_is_refused(store, uri, endpoint, tmp_path):
    out, record = artifact(tmp_path)
    store.publish(out, record)
    with Proxy(endpoint, lambda method, path: FLIP if method == "GET" and "big.bin" in path else "") as proxy:
        reader = S3Store(uri, tmp_path / "other", proxy.endpoint)
        with pytest.raises(CuveeError, match="is not what was published"):
            reader.fetch(record["fingerprint"])
    assert not (tmp_path / "other" / record["fingerprint"] / records.NAME).exists()


def test_an_outage_publishes_nothing_and_the_next_attempt_sends_only_the_rest(uri, endpoint, tmp_path):
    out, record = artifact(tmp_path)
    down = threading.Event()
    with Proxy(endpoint, lambda method, path: DOWN if down.is_set() and "small.txt" in path else "") as proxy:
        down.set()
        store = S3Store(uri, tmp_path / "cache", proxy.endpoint)
        store.bucket.patience = 1.0
        with pytest.raises(CuveeError, match="store.uri=.* at http://127.*check the bucket"):
            store.publish(out, record)
        assert store.record(record["fingerprint"]) is None and list(store.fingerprints()) == []
        down.clear()
        proxy.seen.clear()
        store.publish(out, record)
        assert not [path for method, path, _ in proxy.seen if method in ("PUT", "POST") and "big.bin" in path]
    assert list(S3Store(uri, tmp_path / "other", endpoint).fingerprints()) == [record["fingerprint"]]


def test_an_outage_of_some_time_ends_nothing(uri, endpoint, tmp_path):
    """Longer than all of boto3's own attempts, at every request there is."""
    out, record = artifact(tmp_path)
    down = threading.Event()
    with Proxy(endpoint, lambda method, path: DOWN if down.is_set() else "") as proxy:
        store = S3Store(uri, tmp_path / "cache", proxy.endpoint)
        down.set()
        threading.Timer(4, down.clear).start()
        with store.lease(record["fingerprint"]):
            store.publish(out, record)
        down.set()
        threading.Timer(4, down.clear).start()
        assert list(lineage.verify(store, record)) == []
        assert sum(happened == DOWN for *_, happened in proxy.seen) > 2 * _bucket.ATTEMPTS


def test_of_rivals_with_other_bytes_one_wins_whole(uri, endpoint, tmp_path):
    rivals = [artifact(tmp_path / str(seed), seed, 300_000) for seed in range(4)]
    stores = [S3Store(uri, tmp_path / str(seed) / "cache", endpoint) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        published = list(pool.map(lambda seed: stores[seed].publish(*rivals[seed]), range(4)))
    assert all(record == published[0] for record in published)
    for store in stores:
        assert records.digest_files(store.fetch(published[0]["fingerprint"])) == published[0]["files"]
    assert list(lineage.verify(stores[0], published[0])) == []


def test_a_service_without_conditional_writes_is_refused(moto, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "k")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.session.Session().client("s3", endpoint_url=moto).create_bucket(Bucket="unconditional")
    with Proxy(moto, lambda method, path: IGNORE) as proxy:
        store = S3Store("s3://unconditional/p", tmp_path / "cache", proxy.endpoint)
        with pytest.raises(CuveeError, match="ignores conditional writes .* use AWS S3, MinIO or Ceph"):
            store.lease("f" * 32)
        out, record = artifact(tmp_path, size=10)
        with pytest.raises(CuveeError, match="ignores conditional writes"):
            store.publish(out, record)
        assert list(store.bucket.names("")) == []


def test_refusals_are_one_sentence_with_the_way_out(radosgw, monkeypatch, tmp_path):
    for name, value in radosgw.environment().items():
        monkeypatch.setenv(name, value)
    client = boto3.session.Session().client("s3", endpoint_url=radosgw.endpoint)
    client.create_bucket(Bucket="refusals")
    store = S3Store("s3://refusals/p", tmp_path / "cache", radosgw.endpoint)
    out, record = artifact(tmp_path, size=10)

    radosgw.restrict(True)  # permission lost while it runs
    try:
        with pytest.raises(CuveeError, match="UserSuspended|AccessDenied") as refused:
            store.publish(out, record)
    finally:
        radosgw.restrict(False)
    assert "\n" not in str(refused.value) and list(store.fingerprints()) == []
    store.publish(out, record)

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-7731")
    with pytest.raises(CuveeError, match="SignatureDoesNotMatch: the secret key is wrong; check AWS_PROFILE") as refused:
        S3Store("s3://refusals/p", tmp_path / "cache", radosgw.endpoint)
    assert "canary-7731" not in str(refused.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(CuveeError, match="InvalidAccessKeyId: the service does not know this access key"):
        S3Store("s3://refusals/p", tmp_path / "cache", radosgw.endpoint)
    for uri in ("s3://key:canary-7731@refusals/p", "https://canary-7731@refusals"):
        with pytest.raises(CuveeError, match="must not hold credentials|is no S3 address") as refused:
            S3Store(uri, tmp_path / "cache", radosgw.endpoint)
        assert "canary-7731" not in str(refused.value)


def test_a_wrong_clock_is_one_sentence(radosgw, monkeypatch, tmp_path):
    for name, value in radosgw.environment().items():
        monkeypatch.setenv(name, value)
    boto3.session.Session().client("s3", endpoint_url=radosgw.endpoint).create_bucket(Bucket="clocks")

    def late(remove_tzinfo=True):
        now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
        return now.replace(tzinfo=None) if remove_tzinfo else now

    monkeypatch.setattr(botocore.auth, "get_current_datetime", late)
    with pytest.raises(CuveeError, match="RequestTimeTooSkewed: this machine's clock is wrong"):
        S3Store("s3://clocks/p", tmp_path / "cache", radosgw.endpoint)


def test_a_store_that_is_only_looked_at_needs_no_cache(uri, endpoint, tmp_path):
    """A plan for a cluster is made where the cluster's volume is not mounted."""
    assert S3Store(uri, tmp_path / "volume" / "cache", endpoint).record("0" * 64) is None
    assert not (tmp_path / "volume").exists()


def test_the_cache_keeps_its_limit_and_never_removes_what_is_in_use(uri, endpoint, tmp_path):
    store = S3Store(uri, tmp_path / "cache", endpoint)
    made = []
    for at in range(4):
        out = tmp_path / str(at) / "out"
        out.mkdir(parents=True)
        (out / "f").write_bytes(os.urandom(1000))
        made.append(f"{at}" * 32)
        store.publish(out, {"fingerprint": made[-1], "files": records.digest_files(out), "inputs": {}})
    small = S3Store(uri, tmp_path / "small", endpoint, cache_gb=3000 / 1e9)  # with records, room for two
    cached = lambda: sorted(path.name for path in (tmp_path / "small").iterdir() if path.name != ".locks")  # noqa: E731
    small.fetch(made[0])
    for fingerprint in made[1:]:
        assert (small.fetch(fingerprint) / "f").exists()
        small.release(fingerprint)
    assert made[0] in cached() and len(cached()) == 2  # the oldest, but it is held
    other = S3Store(uri, tmp_path / "small", endpoint, cache_gb=1 / 1e9)  # another process that shares the folder
    other.fetch(made[1])
    assert made[0] in cached() and made[1] in cached()
    small.release(made[0])
    other.release(made[1])
    other.fetch(made[2])
    assert cached() == [made[2]]


def checkpoint(scratch, step, blocks):
    folder = scratch / "checkpoints" / f"{step:010d}"
    folder.mkdir(parents=True)
    for name, block in blocks.items():
        (folder / name).write_bytes(block)
    (folder / "commit.json").write_text(json.dumps({"progress": {"step": step}}))
    (scratch / "metrics.jsonl").write_text("".join(f'{{"step": {s}}}\n' for s in range(1, step + 1)))
    (scratch / "rollouts").mkdir(exist_ok=True)
    (scratch / "rollouts" / "block-1.jsonl").write_text("rows")
    (scratch / "rollouts" / "block-1-0123.npz").write_bytes(b"values")
    (scratch / "rollouts" / "weights.bin").write_text("made again where they are needed")
    return folder


def send(kept, folder):
    kept.seal(folder.name, kept.send(folder, [path.name for path in folder.iterdir()]))


def test_checkpoints_go_on_at_another_host(uri, endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "CHUNK_BYTES", 1000)
    same, first, second = os.urandom(5500), os.urandom(2500), os.urandom(2500)
    here, there = tmp_path / "here", tmp_path / "there"
    with Proxy(endpoint, every_second(LOST_ANSWER, "PUT")) as proxy:
        kept = mirror.Mirror(uri, proxy.endpoint, "f" * 32)
        for step, block in ((2, first), (4, second), (6, first)):
            send(kept, checkpoint(here, step, {"a.distcp": same, "b.distcp": block}))
    with Proxy(endpoint) as proxy:
        kept = mirror.Mirror(uri, proxy.endpoint, "f" * 32)
        kept.send(here / "checkpoints" / f"{6:010d}", ["a.distcp", "b.distcp", "commit.json"])
        assert not [path for method, path, _ in proxy.seen if method == "PUT"]  # nothing new
    bucket = Bucket(uri, endpoint)
    kept = mirror.Mirror(uri, endpoint, "f" * 32, bucket)
    names = [name.removeprefix(kept.base) for name, _ in bucket.names(kept.base)]
    assert [name for name in names if "/" not in name] == [f"{step:010d}.json" for step in (4, 6)]
    assert len(names) == 2 + len(chunks_of(bucket, kept.base))  # what no manifest names is gone
    restored = mirror.Mirror(uri, endpoint, "f" * 32).pull(there)
    assert restored == there / "checkpoints" / f"{6:010d}"
    assert records.digest_files(restored) == records.digest_files(here / "checkpoints" / f"{6:010d}")
    for beside in ("metrics.jsonl", "rollouts/block-1.jsonl", "rollouts/block-1-0123.npz"):
        assert (there / beside).read_bytes() == (here / beside).read_bytes()
    assert sorted(path.name for path in there.iterdir()) == ["checkpoints", "metrics.jsonl", "rollouts"]
    assert mirror.Mirror(uri, endpoint, "f" * 32).pull(there) is None  # as new a one is there

    damaged = f"{kept.base}chunks/{hashlib.sha256(first[:1000]).hexdigest()}"
    bucket.put(damaged, b"something else")
    lines = []
    found = mirror.Mirror(uri, endpoint, "f" * 32).pull(tmp_path / "third", lines.append)
    assert found.name == f"{4:010d}" and re.search("step 6 in the store can't be used.*not what was sent", lines[0])
    kept.clear()
    assert list(bucket.names(kept.base)) == []


def chunks_of(bucket, base):
    tables = [json.loads(bucket.get(name)[0]) for name, _ in bucket.names(base) if name.endswith(".json")]
    return {digest for table in tables for digests in table.values() for digest in digests}


def test_a_manifest_can_not_escape_its_folder(store, tmp_path):
    base = "scratch/x/"
    digest = hashlib.sha256(b"evil").hexdigest()
    store.bucket.put(f"{base}chunks/{digest}", b"evil")
    for name in ("../../../evil", "/evil", "a/../../evil"):
        store.bucket.put(f"{base}0000000001.json", records.canonical({name: [digest]}))
        with pytest.raises(CuveeError, match="leads out of that folder"):
            mirror.pull_checkpoint(store.bucket, base, "0000000001", tmp_path / "scratch")
    store.bucket.put(f"{base}0000000001.json", records.canonical({"evil": [digest]}))
    with pytest.raises(CuveeError, match="names no committed checkpoint"):
        mirror.pull_checkpoint(store.bucket, base, "0000000001", tmp_path / "scratch")
    assert not list(tmp_path.rglob("evil"))


def test_an_artifact_can_not_escape_its_folder(store, tmp_path):
    out, record = artifact(tmp_path, size=10)
    store.publish(out, record)
    changed = store.record(record["fingerprint"]) | {"files": {"../../evil": {"sha256": "0" * 64, "size": 4}}}
    store.bucket.put(f"artifacts/{record['fingerprint']}/{records.NAME}", records.dumps(changed))
    store._records.clear()
    with pytest.raises(CuveeError, match="'../../evil' is no file of .* leads out of that folder"):
        store.fetch(record["fingerprint"])


class Evil:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_checkpoint_from_a_bucket_can_not_run_code(store, tmp_path):
    folder = checkpoint(tmp_path / "here", 1, {".metadata": pickle.dumps(Evil(tmp_path / "evil"))})
    kept = mirror.Mirror("", "", "f" * 32, store.bucket)
    send(kept, folder)
    lines = []
    assert kept.pull(tmp_path / "there", lines.append) is None
    assert "names posix.mkdir, which no checkpoint needs" in lines[0]
    assert not (tmp_path / "evil").exists() and not list((tmp_path / "there").iterdir())


def test_aliases_and_lineage_through_a_bucket(store, uri, endpoint, tmp_path):
    parent = make(store, tmp_path / "1", "base", {"lr": 1e-3})
    child = make(store, tmp_path / "2", "sft", {"lr": 1e-4}, {"init": parent})
    store.set_alias("polished", child["fingerprint"])
    other = S3Store(uri, tmp_path / "other", endpoint)
    assert lineage.find(other, "polished") == child and list(lineage.verify(other, child)) == []
    place = s3.place(parent)
    other.bucket.put(f"{place}a.txt", b"weighty")
    other.bucket.put(f"{place}extra", b"1")
    other.bucket.delete(f"{place}sub/b.bin")
    told = {line.split(": ", 1)[1] for line in lineage.verify(other, child)}
    assert told == {"a.txt was changed (its SHA-256 is not the recorded one)", "extra is not in the record",
                    "sub/b.bin is missing"}
