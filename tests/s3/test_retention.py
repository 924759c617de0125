"""What `cuvee clean` removes, and above all what it does not."""

import os
import time

import pytest

from stages.store import mirror, retention
from stages.store import record as records
from stages.store.local import LocalStore
from stages.store.retention import DAY, clean
from stages.store.s3 import S3Store, place
from tests.unit.test_store import make

YOUNG = 1.0  # days; nothing here is as old


def test_in_a_bucket(uri, endpoint, tmp_path, request, monkeypatch):
    store = S3Store(uri, tmp_path / "cache", endpoint)
    bucket = store.bucket
    record = make(store, tmp_path / "1", "base", {"lr": 1e-3})
    store.set_alias("base", record["fingerprint"])
    second = f"artifacts/{record['fingerprint']}/0123456789ab/a.txt"
    half, held, begun = f"artifacts/{'a' * 32}/0123456789ab/a.txt", f"artifacts/{'b' * 32}/x/f", f"scratch/{'c' * 32}/chunks/1"
    for name in (second, half, held, begun):
        bucket.put(name, b"1")
    if request.node.callspec.params["endpoint"] != "moto":  # which says of every upload that it was begun in 2010
        bucket.s3.create_multipart_upload(Bucket=bucket.name, Key=bucket.key("artifacts/cut/off"))
    living = store.lease("b" * 32)
    assert living.acquire()
    everything = {name for name, _ in bucket.names("")}
    assert list(clean(store, YOUNG, tmp_path / "none")) == [] and {name for name, _ in bucket.names("")} == everything

    old = max(item["LastModified"] for _, item in bucket.names(""))
    time.sleep(2.1)  # services tell times in whole seconds
    bucket.put(f"artifacts/{'d' * 32}/x/one", b"1")
    bucket.put(f"artifacts/{'d' * 32}/x/two", b"1")  # being uploaded now
    now = min(item["LastModified"] for _, item in bucket.names(f"artifacts/{'d' * 32}/"))
    monkeypatch.setattr(retention, "_server_time", lambda store: now)  # however slow the machine
    told = list(clean(store, (now - old).total_seconds() / 2 / retention.DAY, tmp_path / "none"))
    left = {name for name, _ in bucket.names("") if not name.startswith("leases/")}
    assert left == {f"artifacts/{record['fingerprint']}/{records.NAME}", "aliases/base", held,
                    *(place(record) + name for name in record["files"]),
                    f"artifacts/{'d' * 32}/x/one", f"artifacts/{'d' * 32}/x/two"}
    assert len(told) == 3 + ("cut/off" in "".join(told)) and "Uploads" not in bucket.s3.list_multipart_uploads(Bucket=bucket.name)
    other = S3Store(uri, tmp_path / "other", endpoint)
    assert records.digest_files(other.fetch(record["fingerprint"])) == record["files"]
    living.release()


def test_in_a_folder(tmp_path):
    store = LocalStore(tmp_path / "store")
    record = make(store, tmp_path / "1", "base", {"lr": 1e-3})
    for name in ("a" * 32, "b" * 32, "d" * 32):
        store.folder(name).mkdir()
        (store.folder(name) / "f").write_text("1")
    past = time.time() - 10 * DAY
    for path in [*store.folder(record["fingerprint"]).rglob("*"), store.folder(record["fingerprint"])]:
        os.utime(path, (past, past))  # a published artifact has no age
    for name in ("a" * 32, "b" * 32):
        for path in (store.folder(name) / "f", store.folder(name)):
            os.utime(path, (past, past))
    work = tmp_path / "work"
    for name, when in ((record["fingerprint"], past), ("e" * 32, past), ("f" * 32, time.time())):
        (work / name / "scratch").mkdir(parents=True)
        (work / name / "log.txt").touch()
        for path in [*(work / name).rglob("*"), work / name]:
            os.utime(path, (when, when))
    with store.lease("b" * 32):
        told = list(clean(store, 7, work))
    assert len(told) == 2 and "a" * 32 in told[0] and "e" * 32 in told[1]
    assert sorted(path.name for path in work.iterdir()) == sorted([record["fingerprint"], "f" * 32])
    assert not list((store.root / "leases").iterdir())
    assert sorted(path.name for path in (store.root / "artifacts").iterdir()) == sorted(
        [record["fingerprint"], "b" * 32, "d" * 32])
    assert store.fetch(record["fingerprint"])


def test_a_stage_that_is_published_leaves_no_checkpoints(uri, endpoint, tmp_path):
    store = S3Store(uri, tmp_path / "cache", endpoint)
    record = make(store, tmp_path / "1", "base", {})
    folder = tmp_path / "scratch" / "checkpoints" / "0000000002"
    folder.mkdir(parents=True)
    (folder / "commit.json").write_text("{}")
    kept = mirror.Mirror(**store.mirror(record["fingerprint"]))
    kept.seal(folder.name, kept.send(folder, ["commit.json"]))
    assert list(store.bucket.names("scratch/"))
    store.forget(record["fingerprint"])
    assert not list(store.bucket.names("scratch/")) and store.fetch(record["fingerprint"])


@pytest.mark.parametrize("days", ["0", "0.5"])
def test_young_things_are_refused(days, capsys, monkeypatch):
    from flows import cli

    monkeypatch.setattr("sys.argv", ["cuvee", "clean", "--days", days])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "give at least 1" in capsys.readouterr().err
