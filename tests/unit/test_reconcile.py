"""Which runs count as dead: those of this host whose process is gone, never another host's."""

import json

import pytest

from flows import reconcile
from stages.store import lease

NAME, BOOT, SPACE = lease.here().split()
ME = lease.this_process()


@pytest.mark.parametrize("note, dead", [
    (ME, False),
    (ME | {"born": 1}, True),  # the number was given to another process
    (ME | {"pid": 2**22 - 1}, True),
    (ME | {"host": f"{NAME} another-boot {SPACE}"}, True),  # the power failed
    (ME | {"host": f"{NAME} {BOOT} pid:[1]"}, True),  # the container was started again
    (ME | {"host": f"elsewhere {BOOT} {SPACE}", "pid": 1, "born": 1}, False),  # it shares the state directory
])
def test_which_runs_are_closed(note, dead, tmp_path, monkeypatch):
    monkeypatch.setenv("CUVEE_STATE", str(tmp_path))
    closed = []
    monkeypatch.setattr(reconcile, "_close_prefect", closed.append)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a-run.json").write_text(json.dumps(note))
    with reconcile.registered("mine"):
        assert closed == (["a-run"] if dead else [])
        assert sorted(path.stem for path in (tmp_path / "runs").iterdir()) == (["mine"] if dead else ["a-run", "mine"])
    assert not (tmp_path / "runs" / "mine.json").exists()


def test_a_run_that_ends_while_another_starts_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("CUVEE_STATE", str(tmp_path))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a-run.json").symlink_to(tmp_path / "gone")  # was listed, and is no more when it is read
    with reconcile.registered("mine"):
        assert (tmp_path / "runs" / "mine.json").exists()
