import json
import multiprocessing
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import boto3
import psutil
import pytest
from moto.server import ThreadedMotoServer

from flows import lineage
from stages.stage import CuveeError
from stages.store import lease
from stages.store import record as records
from stages.store._cache import Cache
from stages.store.lease import FileLease as Lease
from stages.store.local import LocalStore
from stages.store.s3 import S3Store


def make(store, folder, name, config, inputs=None, text="weights"):
    """Publish a small artifact as the maker would; returns its record."""
    out = folder / "out"
    (out / "sub").mkdir(parents=True)
    (out / "a.txt").write_text(text)
    (out / "sub" / "b.bin").write_bytes(b"\x00\x01")
    links = {arg: {"fingerprint": r["fingerprint"], "kind": r["kind"], "digest": r["digest"], "content": records.content(r)}
             for arg, r in (inputs or {}).items()}
    made_by = records.fingerprint("x.y", "1", config, {}, records.input_fingerprints(links))
    return store.publish(out, {
        "fingerprint": made_by, "name": name, "kind": "checkpoint", "stage": "x.y", "version": "1", "config": config,
        "external": {}, "inputs": links, "files": records.digest_files(out), "metrics": {"loss": 1.5},
        "ended": "2026-01-01T00:00:00.000+00:00", "seconds": 1.0})


@pytest.fixture(scope="session")
def s3_endpoint():
    server = ThreadedMotoServer(port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path, monkeypatch):
    if request.param == "local":
        return LocalStore(tmp_path / "store")
    for key, value in {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(key, value)
    endpoint = request.getfixturevalue("s3_endpoint")
    bucket = f"b{time.time_ns()}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
    return S3Store(f"s3://{bucket}/some/prefix", cache=tmp_path / "cache", endpoint=endpoint)


def test_publish_then_read_back(store, tmp_path):
    record = make(store, tmp_path, "base", {"lr": 1e-3})
    assert store.record(record["fingerprint"]) == record
    folder = store.fetch(record["fingerprint"])
    assert (folder / "a.txt").read_text() == "weights" and (folder / "sub" / "b.bin").read_bytes() == b"\x00\x01"
    assert list(store.fingerprints()) == [record["fingerprint"]]
    store.set_alias("polished", record["fingerprint"])
    assert store.aliases() == {"polished": record["fingerprint"]}
    assert lineage.find(store, "polished") == lineage.find(store, record["fingerprint"][:6]) == record


def test_who_may_read_the_store_may_read_what_a_library_wrote_for_its_owner_alone(tmp_path, monkeypatch):
    digest_files = records.digest_files
    monkeypatch.setattr(records, "digest_files", lambda out: (out / "a.txt").chmod(0o600) or digest_files(out))
    store = LocalStore(tmp_path / "store")
    folder = store.folder(make(store, tmp_path, "a", {})["fingerprint"])
    assert (folder / "a.txt").stat().st_mode & 0o777 == folder.stat().st_mode & 0o666 != 0o600


def test_nothing_without_a_record(store):
    assert store.record("0" * 32) is None
    with pytest.raises(CuveeError, match="not in the store"):
        store.fetch("0" * 32)


def test_s3_cold_cache_downloads_and_checks(s3_endpoint, tmp_path, monkeypatch):
    for key, value in {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(key, value)
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="cold")
    record = make(S3Store("s3://cold/p", tmp_path / "one", s3_endpoint), tmp_path, "base", {})
    fp = record["fingerprint"]
    other = S3Store("s3://cold/p", tmp_path / "two", s3_endpoint)
    assert (other.fetch(fp) / "a.txt").read_text() == "weights"
    (key,) = [item["Key"] for item in client.list_objects_v2(Bucket="cold")["Contents"] if item["Key"].endswith("/a.txt")]
    client.put_object(Bucket="cold", Key=key, Body=b"weighty")
    with pytest.raises(CuveeError, match="is not what was published"):
        S3Store("s3://cold/p", tmp_path / "three", s3_endpoint).fetch(fp)
    with pytest.raises(CuveeError, match="store.uri=s3://nowhere.*NoSuchBucket: there is no such bucket"):
        S3Store("s3://nowhere/p", tmp_path / "four", s3_endpoint)


@pytest.fixture
def family(tmp_path):
    """parent -> child, in a local store."""
    store = LocalStore(tmp_path / "store")
    parent = make(store, tmp_path / "1", "base", {"lr": 1e-3})
    child = make(store, tmp_path / "2", "sft", {"lr": 1e-4, "nested": {"steps": 5}}, {"init": parent})
    return store, parent, child


def test_verify_finds_one_flipped_byte_in_any_file_of_any_ancestor(family):
    store, parent, child = family
    assert list(lineage.verify(store, child)) == []
    for record in (parent, child):
        for path in sorted(p for p in store.folder(record["fingerprint"]).rglob("*") if p.is_file()):
            data = path.read_bytes()
            for at in {0, len(data) // 2, len(data) - 1}:
                path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
                try:
                    assert list(lineage.verify(store, lineage.find(store, child["fingerprint"]))), (path, at)
                except CuveeError:  # a record that is no longer JSON
                    assert path.name == records.NAME
                path.write_bytes(data)
    assert list(lineage.verify(store, child)) == []


def test_verify_finds_a_resealed_parent_an_extra_and_a_missing_file(family):
    store, parent, child = family
    folder = store.folder(parent["fingerprint"])
    record = json.loads((folder / records.NAME).read_text())
    record["metrics"]["loss"] = 0.1
    (folder / records.NAME).write_bytes(records.dumps(records.seal(record)))
    assert any("is not the artifact that was used" in d for d in lineage.verify(store, child))
    (folder / records.NAME).write_bytes(records.dumps(parent))
    (folder / "extra").touch()
    (folder / "a.txt").unlink()
    assert {d.split(": ", 1)[1] for d in lineage.verify(store, child)} == {"extra is not in the record", "a.txt is missing"}


def test_verify_tells_what_was_made_again_from_what_was_changed(family, tmp_path):
    """A damaged artifact that is deleted and made again has another record: with the same files that is no defect."""
    store, parent, child = family
    for text, said in (("weights", lineage.AGAIN), ("others", "is not the artifact that was used (its record changed)")):
        shutil.rmtree(store.folder(parent["fingerprint"]))
        out = tmp_path / text
        made = make(store, out, "base", {"lr": 1e-3}, text=text) | {"ended": "2026-01-02T00:00:00.000+00:00"}
        (store.folder(parent["fingerprint"]) / records.NAME).write_bytes(records.dumps(records.seal(made)))
        (line,) = lineage.verify(store, child)
        assert line.endswith(f"input init {said}")


def test_why_and_diff_name_fields(family, tmp_path):
    store, parent, child = family
    other = make(store, tmp_path / "3", "sft", {"lr": 2e-4, "nested": {"steps": 5}}, {"init": parent})
    assert [line.strip().split()[:2] for line in lineage.why(store, child)][::2] == [
        ["sft", child["fingerprint"][:12]], ["init:", "base"]]
    assert "config.lr: 0.0001 -> 0.0002" in "\n".join(lineage.diff(store, child, other))
    assert "one artifact" in next(lineage.diff(store, child, child))
    store.set_alias("polished", child["fingerprint"])
    with pytest.raises(CuveeError, match="'polishd' is not known"):
        lineage.find(store, "polishd")
    grown = make(store, tmp_path / "4", "base", {"lr": 2e-3})
    other = make(store, tmp_path / "5", "sft", {"lr": 1e-4}, {"init": grown})
    assert "config.lr: 0.001 -> 0.002" in "\n".join(lineage.diff(store, child, other))
    shutil.rmtree(store.folder(grown["fingerprint"]))
    with pytest.raises(CuveeError, match="sft: its input init .* is not in the store"):
        list(lineage.diff(store, child, other))


def test_a_size_that_changed_is_refused_on_every_read(family):
    store, parent, _ = family
    (store.folder(parent["fingerprint"]) / "a.txt").write_text("more than before")
    with pytest.raises(CuveeError, match="the record says 7 bytes"):
        store.fetch(parent["fingerprint"])


def test_placement_and_key_order_do_not_enter_the_fingerprint():
    a = records.fingerprint("s", "1", {"a": 1, "b": 2.0}, {}, {"x": "f"})
    assert a == records.fingerprint("s", "1", {"b": 2.0, "a": 1}, {}, {"x": "f"})
    assert a != records.fingerprint("s", "2", {"a": 1, "b": 2.0}, {}, {"x": "f"})


def _hold(path, ready):
    Lease(path).__enter__()
    ready.set()
    time.sleep(60)


def test_a_lease_is_exclusive_and_passes_from_a_dead_holder(tmp_path):
    path = tmp_path / "leases" / "f"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(path, ready))
    holder.start()
    assert ready.wait(300)  # it imports what this file does
    mine = Lease(path)
    assert not mine.acquire()
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    assert not mine.wait(cancelled)  # Ctrl-C while another run makes it
    holder.kill()
    holder.join()
    assert any(mine.acquire() for _ in range(3))
    mine.release()
    assert not path.exists()


@pytest.mark.parametrize("text", ['{"token": "t", "host": "elsewhere", "pid": 1, "born": 1}', ""])
def test_a_lease_of_another_host_expires_when_its_heartbeat_stops_whatever_the_clocks_say(tmp_path, monkeypatch, text):
    """Also one that a power failure left empty."""
    now, path = [0.0], tmp_path / "f"
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: now[0]))
    path.write_text(text)
    mine = Lease(path, expiry=6)
    for beat in (1e9, 2e9, 3e9):  # a clock that is years late, or years ahead, still beats
        os.utime(path, (beat, beat))
        now[0] += 4
        assert not mine.acquire() and path.exists()
    now[0] += 3600  # not looked at for an hour: that is no silence
    assert not mine.acquire() and path.exists()
    now[0] += 4
    assert not mine.acquire() and mine.acquire()
    mine.release()
    assert not path.exists()


def test_a_living_holder_stays_one_when_the_clock_is_set(tmp_path, monkeypatch):
    """psutil's time of birth moves with it."""
    held, rival = Lease(tmp_path / "f"), Lease(tmp_path / "f")
    with held:
        monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: 12345.0)
        assert not rival.acquire() and not rival.acquire()


def test_many_threads_write_one_file(tmp_path):
    """As stages do that fetch one artifact at the same time."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda at: records.write_atomic(tmp_path / "f", bytes([at]) * 100_000), range(200)))
    assert len(set((tmp_path / "f").read_bytes())) == 1 and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_cache_is_measured_while_files_come_and_go(tmp_path):
    cache, stop = Cache(tmp_path, 1), threading.Event()
    folder = cache.hold("f" * 32)
    folder.mkdir()

    def download():
        while not stop.is_set():
            (folder / ".part").write_bytes(b"1")
            (folder / ".part").rename(folder / "whole")

    thread = threading.Thread(target=download)
    thread.start()
    try:
        for _ in range(2000):
            cache.trim()
    finally:
        stop.set()
        thread.join()
    assert (folder / "whole").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_without_permission_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CuveeError, match="folder that you may write"):
        LocalStore(tmp_path / "store")


def test_a_store_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "store").touch()
    with pytest.raises(CuveeError, match="store.uri=.*give a folder"):
        LocalStore(tmp_path / "store")
