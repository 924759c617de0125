"""Formats that are read, and what is broken in them: each record counted, kept aside, none fatal."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import random
import zlib

import pytest

from stages.data import corpus, curate
from stages.data.document import Document
from stages.data.formats import jsonl
from stages.data.formats import warc as warc_format
from stages.data.sources import _files
from stages.stage import Context, CuveeError, names, parse, resolve

from test_data_curate import prose  # isort: skip


def read(path) -> list[Document]:
    return list(_files.documents(_files.entries(str(path))))


def run(tmp_path, docs, **values):
    out = tmp_path / "out"
    out.mkdir()
    config = parse(curate.Config, {"sources": [str(docs)], **values}, "data")
    curate.run(config, {}, out, Context(tmp_path))
    found = {split: {row["id"]: row for row in corpus.documents(out, split)} for split in ("train", "heldout", "removed")}
    return found["train"] | found["heldout"], found["removed"], json.loads((out / "table.json").read_text())


def test_ten_percent_broken_in_ten_ways(tmp_path, monkeypatch):
    """Every way ten times among nine hundred good records: all accounted for, under a reason of their own."""
    monkeypatch.setattr(jsonl, "LONGEST", 100_000)
    docs = tmp_path / "docs"
    docs.mkdir()
    good = [json.dumps({"text": prose(i, 150), "url": f"http://crawl/{i}"}).encode() for i in range(900)]
    line = json.dumps({"text": prose(5000)}).encode()
    ways = {
        "record is not UTF-8": [line[:-3] + b"\xff\xfe" + line[-3:]] * 10,
        "NUL in the text": [b'{"text": "a \\u0000 in the middle of a text"}'] * 10,
        "line too long": [b'{"text": "' + b"x" * 150_000 + b'"}'] * 10,
        "record without a text field": [b'{"text": ""}', b"{}"] * 5,
        "text of a wrong type": [b'{"text": 17}', b'{"text": {"a": 1}}'] * 5,
        "record is nested too deep": [b"[" * 90_000 + b"]" * 5] * 10,
        "lone surrogate in the text": [b'{"text": "half an emoji \\ud83d here"}'] * 10,
    }
    lines = good + [one for found in ways.values() for one in found]
    lines += [json.dumps({"text": prose(7000 + i, 150), "id": i // 2}).encode() for i in range(20)]
    random.Random(0).shuffle(lines)
    (docs / "crawl.jsonl").write_bytes(b"\n".join(lines))
    for i in range(10):
        (docs / f"cut{i}.jsonl.gz").write_bytes(gzip.compress(line + b"\n" + random.Random(i).randbytes(9000).hex().encode())[:4000])
        (docs / f"bomb{i}.html").write_text("<div>" * 100_000 + prose(8000 + i))
    blocks = ["url", "encoding", "html", "quality", "exact", "split"]
    kept, removed, table = run(tmp_path, docs, blocks=blocks, options={"split": {"heldout": 0.01}})
    assert len(kept) == 911  # every good one, the first of those with one identifier, and what the cut files still gave
    reasons = [(row["block"], row["reason"].partition(":")[0]) for row in removed.values()]
    for way in ways:
        assert reasons.count(("read", way)) == 10, way
    assert reasons.count(("read", "damaged gz file")) == 10
    assert reasons.count(("html", "page nested too deep")) == 10
    assert reasons.count(("url", "same id")) == 10
    assert sum(row["documents"] for row in table["rows"]) == len(kept) + len(removed)


def test_a_long_line_costs_no_memory():
    """200 MB are passed over in pieces."""
    class Long(io.RawIOBase):
        left = 200 << 20

        def readable(self):
            return True

        def readinto(self, buffer):
            count = min(self.left, len(buffer))
            buffer[:count] = b"x" * count
            self.left -= count
            return count

    import tracemalloc

    tracemalloc.start()
    found = list(jsonl.read(_files.Entry("a.jsonl", 1, "", take=1), io.BufferedReader(Long())))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [document.fault for document in found] == [f"line too long: {200 << 20} bytes"] and peak < 4 * jsonl.LONGEST


def test_a_line_as_long_as_may_be_swallows_no_other(tmp_path, monkeypatch):
    lines = [json.dumps({"text": "x" * count}) + "\n" for count in (30, 29, 31, 5)]
    monkeypatch.setattr(jsonl, "LONGEST", len(lines[0]))
    (tmp_path / "a.jsonl").write_text("".join(lines))
    assert [(len(document.text), document.fault) for document in read(tmp_path)][:2] == [(30, ""), (29, "")]
    assert [document.fault for document in read(tmp_path)][2:] == [f"line too long: {len(lines[2])} bytes", ""]


def test_a_cut_file_reads_as_the_whole(tmp_path):
    lines = b"".join(json.dumps({"text": prose(i)}).encode() + b"\n" for i in range(50))
    (tmp_path / "a.jsonl").write_bytes(lines)
    entry, whole = _files.entries(str(tmp_path))[0], [document.text for document in read(tmp_path)]
    for step in (1000, 333, len(lines)):
        parts = [_files.Entry("a.jsonl", entry.size, entry.path, entry.size, False, start, min(start + step, entry.size))
                 for start in range(0, entry.size, step)]
        found = list(_files.documents(parts))
        assert [document.text for document in found] == whole and len({document.id for document in found}) == 50


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", None)])
def test_compressed(tmp_path, suffix, pack):
    import pyarrow

    pack = pack or (lambda data: pyarrow.compress(data, "zstd", asbytes=True))
    data = "".join(json.dumps({"text": prose(i)}) + "\n" for i in range(300)).encode()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(data))
    assert [document.text for document in read(tmp_path)] == [prose(i) for i in range(300)]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(data)[:-100])
    found = read(tmp_path)
    assert found[-1].fault == f"damaged {suffix[1:]} file" and all(one.text == prose(i) for i, one in enumerate(found[:-1]) if not one.fault)


def warc(records) -> bytes:
    from fastwarc.warc import WarcHeaderMap  # noqa: F401  (present wherever resiliparse is)

    found = b""
    for kind, url, head, body in records:
        payload = head + body
        found += (f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
                  f"WARC-Record-ID: <urn:uuid:{len(found):032x}>\r\nContent-Type: "
                  + ("application/http; msgtype=response" if head else "text/plain")
                  + f"\r\nContent-Length: {len(payload)}\r\n\r\n").encode() + payload + b"\r\n\r\n"
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_web_archives(tmp_path, packed):
    html = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=koi8-r\r\n\r\n"
    page = "<html><head><meta charset='koi8-r'></head><body><p>Все люди рождаются свободными</p></body></html>".encode("koi8-r")
    records = [("response", "http://a/1", html, page), ("response", "http://a/2", html.replace(b"200", b"404"), page),
               ("response", "http://a/3", html.replace(b"text/html", b"image/png"), b"\x89PNG"), ("request", "http://a/4", b"", b"GET /"),
               ("conversion", "http://a/5", b"", b"A text.")]
    parts = [warc([record]) for record in records]
    name, data = ("a.warc.gz", b"".join(map(gzip.compress, parts))) if packed else ("a.warc", b"".join(parts))
    (tmp_path / name).write_bytes(data)
    found = [document for document in read(tmp_path) if not document.fault]
    assert [document.url for document in found] == ["http://a/1", "http://a/5"]
    assert found[0].markup == "html" and "Все люди рождаются свободными" in found[0].text and found[1].text == "A text."
    (tmp_path / name).write_bytes(data[:-40])  # a cut archive gives what is whole, and says so
    assert [(document.url, bool(document.fault)) for document in read(tmp_path)][0] == ("http://a/1", False)
    assert [document.fault for document in read(tmp_path)][1:] == ["record cut short"]
    for junk in (b"no archive at all\n" * 20, data + b"junk at the end\r\n\r\n"):
        (tmp_path / name).write_bytes(junk)
        assert read(tmp_path)[-1].fault.startswith("damaged web archive: ")


def test_pages_as_servers_sent_them(tmp_path):
    page = b"<p>" + b"a page of many words " * 30 + b"</p>"
    packed, bare = gzip.compress(page), zlib.compress(page)[2:-4]
    ways = {"gzip": ("Content-Encoding: gzip", packed), "GZIP": ("content-encoding: X-GZIP", packed), "left": ("Content-Encoding: gzip", page),
            "bare": ("Content-Encoding: deflate", bare), "zlib": ("Content-Encoding: deflate", zlib.compress(page)),
            "chunks": ("Transfer-Encoding: chunked", b"5;a=b\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (page[:5], len(page) - 5, page[5:])),
            "both": ("Transfer-Encoding: chunked\r\nContent-Encoding: gzip", b"%X\r\n%s\r\n0\r\n\r\n" % (len(packed), packed)),
            "joined": ("Transfer-Encoding: chunked", page), "plain": ("Server: x", page)}
    bad = {"cut": ("Content-Encoding: gzip", packed[:10] + b"\xff" * 30), "br": ("Content-Encoding: br", b"\x1b\x12\x00\xff\xfe")}
    records = [("response", f"http://{name}", f"HTTP/1.1 200 OK\r\nContent-Type: Text/HTML\r\n{head}\r\n\r\n".encode(), body)
               for name, (head, body) in (bad | ways).items()]
    (tmp_path / "a.warc").write_bytes(warc(records))
    found = {document.url[7:]: document for document in read(tmp_path)}
    assert [found[name].fault.partition(":")[0] for name in bad] == ["damaged or unknown content encoding"] * 2
    assert list(found) == [*bad, *ways] and all(found[name].text.encode() == page and not found[name].fault for name in ways)
    forward = io.BufferedReader(type("Bucket", (io.BytesIO,), {"seekable": lambda self: False})((tmp_path / "a.warc").read_bytes()))
    assert [document.url for document in warc_format.read(_files.Entry("a.warc", 1, ""), forward)] == [f"http://{name}" for name in found]
    (tmp_path / "a.warc").rename(tmp_path / "a.warc.xz")
    assert read(tmp_path)[0].fault == "web archive packed as xz: pack it with gzip, a member a record"


def test_a_disk_error_is_no_damaged_record(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n'))

    class Failing(io.RawIOBase):
        place = 0

        def readable(self):
            return True

        def seekable(self):
            return True

        def seek(self, offset, whence=0):
            self.place = 1000 if whence == 2 else self.place + offset if whence else offset
            return self.place

        def tell(self):
            return self.place

        def readinto(self, buffer):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(_files.Entry, "open", lambda self: io.BufferedReader(Failing()))
    for name in ("a.jsonl.gz", "a.warc", "a.parquet"):
        next(tmp_path.iterdir()).rename(tmp_path / name)
        with pytest.raises(CuveeError, match="Input/output error"):
            read(tmp_path)


def test_one_bad_value_costs_one_record_of_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    values = pyarrow.array([b"one", b"tw\xff", b"three"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    assert [(document.text, document.fault) for document in read(tmp_path)] == [("one", ""), ("", "record is not UTF-8"), ("three", "")]


def pdf(text: str) -> bytes:
    stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
               b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
               b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream), b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj" % number + body + b"endobj\n"
    table = b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + table + b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % len(out)


def test_pdf(tmp_path):
    pytest.importorskip("pypdf")
    (tmp_path / "a.pdf").write_bytes(pdf("The text layer of a page."))
    (tmp_path / "b.pdf").write_bytes(pdf(""))
    (tmp_path / "c.pdf").write_bytes(pdf("x")[:80])
    assert [(document.text, document.fault.partition(":")[0]) for document in read(tmp_path)] == [
        ("The text layer of a page.\n", ""), ("", "PDF without a text layer"), ("", "damaged PDF")]


def test_mail(tmp_path):
    one = b"From: a@b.c\nSubject: =?utf-8?b?R3LDvMOfZQ==?=\nMessage-ID: <1@b>\nContent-Type: text/plain; charset=iso-8859-1\n\nSch\xf6ne Gr\xfc\xdfe.\n"
    two = (b"Subject: two\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=x\n\n--x\nContent-Type: text/html\n\n<p>A page</p>\n"
           b"--x\nContent-Type: application/pdf\n\n%PDF\n--x--\n")
    (tmp_path / "all.mbox").write_bytes(b"From a Mon\n" + one + b"\nFrom b Tue\n" + two + b"\nFrom c Wed\nSubject: empty\n\n")
    (tmp_path / "one.eml").write_bytes(one)
    found = read(tmp_path)
    assert [document.id for document in found] == ["all.mbox#1", "all.mbox#2", "all.mbox#3", "one.eml"]
    assert found[0].text == found[3].text == "Grüße\n\nSchöne Grüße.\n" and found[0].url == "<1@b>"
    assert found[1].markup == "html" and "A page" in found[1].text and found[2].text.startswith("empty")


def test_records_carry_their_address(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "url": "http://a"}\n{"text": "y", "id": 7}\n{"text": "z", "id": "http://b"}\n')
    assert [document.url for document in read(tmp_path)] == ["http://a", "7", "http://b"]


def test_every_format_claims_extensions():
    taken: set[str] = set()
    for name in names("data/formats"):
        module = resolve("data/formats", name)
        assert module.__doc__ and callable(module.read) and module.SUFFIXES and not taken & module.SUFFIXES
        taken |= module.SUFFIXES


def test_a_bare_git_repository(tmp_path, monkeypatch):
    import subprocess

    work = tmp_path / "work"
    (work / "pkg").mkdir(parents=True)
    for i in range(12):
        (work / "pkg" / f"tool{i}.py").write_text(f"def tool_{i}(value):\n    return value + {i}\n" * 5)
    (work / "README.md").write_text(prose(1))
    (work / "link.py").symlink_to("pkg/tool0.py")
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm one", f"clone -q --bare . {tmp_path}/tools.git"):
        subprocess.run(["git", *command.split()], cwd=work, check=True)
    kept, removed, _ = run(tmp_path, tmp_path / "tools.git", blocks=["quality", "split"], workers=2)
    assert len(kept) == 13 and not removed and kept["tools.git/pkg/tool3.py"]["domain"] == "code"
    assert kept["tools.git/pkg/tool3.py"]["text"] == (work / "pkg" / "tool3.py").read_text()


def test_a_hostile_git_repository_runs_nothing(tmp_path, monkeypatch):
    """Its configuration names programs for every occasion, its promisor a remote to fetch from; none of them is started."""
    import subprocess

    from stages.data.sources import _git

    def git(*command, cwd):
        return subprocess.run(["git", *command], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()

    work, bare, witness = tmp_path / "work", tmp_path / "evil.git", tmp_path / "started"
    work.mkdir()
    (work / "a.py").write_text("x = 1\n")
    git("init", "-q", cwd=work)
    git("add", ".", cwd=work)
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one", cwd=work)
    git("clone", "-q", "--bare", ".", str(bare), cwd=work)
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {witness}\n")
    program.chmod(0o755)
    for key in ("core.fsmonitor", "core.sshCommand", "core.pager", "core.alternateRefsCommand", "core.gitProxy", "remote.origin.uploadpack",
                "credential.helper", "diff.external", "filter.x.smudge", "core.editor", "uploadpack.packObjectsHook"):  # fmt: skip
        git("config", key, str(program), cwd=bare)
    for key, value in (("core.hooksPath", str(tmp_path)), ("remote.origin.url", f"ext::{program}"), ("protocol.ext.allow", "always"),
                       ("remote.origin.promisor", "true"), ("extensions.partialClone", "origin"), ("core.repositoryformatversion", "1")):  # fmt: skip
        git("config", key, value, cwd=bare)
    for hook in (bare / "hooks").iterdir():
        program.replace(hook) if program.exists() else hook.unlink()
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", str(program))
    assert [document.text for document in _git.documents(_git.entries(str(bare)))] == ["x = 1\n"]
    tag = _git.entries(str(bare))[0].tag
    (bare / "objects" / tag[:2] / tag[2:]).unlink()  # a missing object would be fetched
    _git._reader.cache_clear()
    with pytest.raises(CuveeError, match="is damaged|cannot be read"):
        list(_git.documents(_git.entries(str(bare))))
    _git._reader.cache_clear()
    assert not witness.exists()
    (bare / "objects/info").mkdir(exist_ok=True)
    (bare / "objects/info/alternates").write_text(f"{tmp_path}/work/.git/objects\n")
    with pytest.raises(CuveeError, match="borrows objects of other folders"):
        _git.entries(str(bare))
