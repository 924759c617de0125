"""A dataset of a Hugging Face hub as a source, from a hub of our own on loopback that speaks its protocol."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, unquote

import pytest

from stages.data import source
from stages.data.sources import _hf
from stages.stage import ConfigError, CuveeError

from stub_server import serving  # isort: skip
from test_data_curate import prose  # isort: skip

COMMIT = "c0ffee" + "0" * 34


FILES: dict[str, bytes] = {}


def answer(asked):
    """The tree, the revision and the bytes (with ranges) of datasets/lake/texts."""
    if asked.method == "POST":
        return _json([_info(name) for name in FILES if name in parse_qs(asked.body.decode())["paths"]])
    if re.fullmatch(r"/api/datasets/lake/texts(/revision/[\w]+)?(\?.*)?", asked.path):
        return _json({"id": "lake/texts", "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0})
    if match := re.fullmatch(rf"/api/datasets/lake/texts/tree/{COMMIT}(/[^?]*)?(\?.*)?", asked.path):
        folder = unquote(match[1] or "").strip("/")
        found = [_info(name) for name in sorted(FILES) if not folder or name.startswith(folder + "/")]
        return _json(found) if found else _json({"error": "no"}, 404, {"X-Error-Code": "EntryNotFound"})
    if match := re.fullmatch(rf"/datasets/lake/texts/resolve/{COMMIT}/([^?]*)", asked.path):
        data = FILES[match[1]]
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", asked.headers.get("Range", "")):
            begin, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
            return 206, data[begin:end], {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
        return 200, data, {}
    return _json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})


def _info(name):
    return {"type": "file", "path": name, "size": len(FILES[name]), "oid": f"{hash(FILES[name]) & 0xFFFFFFFF:040x}"}


def _json(value, status=200, headers={}):  # noqa: B006
    return status, value, {"Content-Type": "application/json", **headers}


@pytest.fixture
def hub(monkeypatch):
    import pyarrow
    import pyarrow.parquet
    from huggingface_hub import constants

    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": [prose(i) for i in range(20, 30)]}), table)
    lines = "".join(json.dumps({"text": prose(i)}) + "\n" for i in range(10))
    FILES.clear()
    FILES.update({"data/a.jsonl": lines.encode(), "data/deep/b.parquet": table.getvalue(), "README.md": prose(99).encode(), ".gitattributes": b"x"})
    with serving(answer) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        yield address


def test_a_dataset_is_read_as_a_stream(hub, monkeypatch):
    (found,) = source.find(["hf://datasets/lake/texts"], 0, 0, 0)
    assert found.label == "texts" and [entry.name for entry in found.entries] == ["README.md", "data/a.jsonl", "data/deep/b.parquet"]
    monkeypatch.setattr(_hf, "BLOCK", 1000)  # so that a file takes several requests
    texts = {document.id: document.text for shard in found.shards("") for document in shard.documents()}
    assert texts["texts/data/a.jsonl#3"] == prose(2) and texts["texts/data/deep/b.parquet#1"] == prose(20) and len(texts) == 21
    (part,) = source.find(["hf://datasets/lake/texts@main/data"], 0, 0, 0)
    assert part.label == "data" and [entry.name for entry in part.entries] == ["a.jsonl", "deep/b.parquet"]
    (one,) = source.find(["hf://datasets/lake/texts/data/a.jsonl"], 0, 0, 0)
    assert [entry.name for entry in one.entries] == ["a.jsonl"]
    before = found.identity()
    FILES["data/a.jsonl"] += b"{}\n"
    assert source.find(["hf://datasets/lake/texts"], 0, 0, 0)[0].identity() != before


def test_workers_read_it_side_by_side(hub, tmp_path):
    """In a process of its own: HF_ENDPOINT is read when the hub's client is imported."""
    script = ("import sys, json\nfrom pathlib import Path\nfrom stages.data import curate, corpus, source\nfrom stages.stage import Context, parse\n"
              "source.SHARD = 1000\nout, scratch = Path(sys.argv[1]) / 'out', Path(sys.argv[1]) / 's'\nout.mkdir(), scratch.mkdir()\n"
              "values = {'sources': ['hf://datasets/lake/texts'], 'blocks': ['exact', 'split'], 'workers': 2}\n"
              "config = parse(curate.Config, values, 'data')\ncurate.external(config)\ncurate.run(config, {}, out, Context(scratch))\n"
              "print(json.dumps(sorted(row['id'] for split in ('train', 'heldout') for row in corpus.documents(out, split))))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parents[2],
                          env={"HF_ENDPOINT": hub, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout.splitlines()[-1])) == 21


def test_refused(hub, monkeypatch):
    from huggingface_hub import constants

    for address in ("hf://lake/texts", "hf://datasets/texts", "hf://models/a/b"):
        with pytest.raises(ConfigError, match="is no dataset of a hub; write hf://datasets/"):
            source.find([address], 0, 0, 0)
    with pytest.raises(CuveeError, match="hf://datasets/lake/nothing cannot be read .*HF_ENDPOINT"):
        source.find(["hf://datasets/lake/nothing"], 0, 0, 0)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(CuveeError, match="cannot be read .*HF_TOKEN and the network"):
        source.find(["hf://datasets/lake/texts"], 0, 0, 0)
