"""Curation as a whole: sources, limits, splits, the sentences for bad input, the same bytes twice."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import time

import pytest

from stages.data import corpus, curate
from stages.stage import ConfigError, Context, CuveeError, names, parse

WORDS = ("river mountain harbour window table letter garden winter summer evening morning question answer story music "
         "bridge village market teacher student doctor kitchen journey island forest paper silver copper stone").split()


def prose(seed: int, words: int = 120) -> str:
    rng = random.Random(seed)
    return " ".join(f"the {rng.choice(WORDS)} of {rng.choice(WORDS)} and {rng.choice(WORDS)} {rng.randrange(999)} is" for _ in
                    range(words // 7)).capitalize() + ".\n"


def code(seed: int) -> str:
    rng = random.Random(seed)
    return "".join(f"def {rng.choice(WORDS)}_{rng.randrange(9999)}({rng.choice(WORDS)}):\n    return {rng.choice(WORDS)}\n\n"
                   for _ in range(8))


def run(tmp_path, **values):
    out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    out.mkdir()
    config = parse(curate.Config, values, "data.curate")
    curate.check(config, {})
    curate.external(config)
    metrics = curate.run(config, {}, out, Context(tmp_path))
    return out, metrics


def ids(out, split):
    return {document["id"]: document for document in corpus.documents(out, split)}


@pytest.fixture
def folder(tmp_path):
    """A user's own folder with a bit of everything, as found."""
    docs = tmp_path / "docs"
    (docs / "deep" / ".git").mkdir(parents=True)
    for i in range(12):
        (docs / f"note{i}.txt").write_text(prose(i))
        (docs / f"tool{i}.py").write_text(code(i))
    (docs / "copy.md").write_text("  " + prose(3).upper())
    (docs / "near.md").write_text(prose(4, 700) + prose(99, 14))
    (docs / "nearer.md").write_text(prose(4, 700) + prose(98, 14))
    (docs / "bad.txt").write_text(prose(50) + "L'Ã©tÃ© Ã  la plage, schÃ¶n fÃ¼r alle Ã¼ber vierzig.\n")
    (docs / "page.html").write_text(f"<html><head><script>var x=1</script></head><body><nav><a href=/>Home</a></nav>"
                                    f"<article><p>{prose(60)}</p></article></body></html>")
    (docs / "latin.txt").write_bytes((prose(61) + "Straße über café déjà naïve Größe schön.\n").encode("cp1252"))
    (docs / "photo.png").write_bytes(b"\x89PNG\0\0\0")
    (docs / ".hidden.txt").write_text(prose(70))
    (docs / "deep" / ".git" / "config.txt").write_text(prose(71))
    lines = [{"text": prose(100)}, {"content": prose(101), "language": "en"}, {"title": "none"}, ["list"]]
    text = "\n".join(json.dumps(line) for line in lines) + "\n{broken\n\n"
    (docs / "a.jsonl").write_text(text)
    with gzip.open(docs / "deep" / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": prose(102)}))
    (docs / "cut.txt.gz").write_bytes(gzip.compress(prose(103).encode())[:40])
    return docs


def test_a_folder_of_ones_own(folder, tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [prose(200), None], "domain": ["letters", "x"], "n": [1, 2]}),
                                folder / "t.parquet")
    (folder / "broken.parquet").write_bytes(b"PAR1 nonsense")
    monkeypatch.setenv("HOME", str(tmp_path))
    out, metrics = run(tmp_path, sources=["~/docs"], options={"split": {"heldout": 0.1}})
    train, heldout, removed = (ids(out, split) for split in ("train", "heldout", "removed"))
    kept = train | heldout
    assert not train.keys() & heldout.keys() and not kept.keys() & removed.keys()
    assert {"code", "prose"} <= {document["domain"] for document in heldout.values()}
    assert kept["docs/tool1.py"]["domain"] == "code" and kept["docs/tool1.py"]["language"] == ""
    assert kept["docs/note1.txt"]["domain"] == "prose" and kept["docs/note1.txt"]["language"] == "en"
    assert kept["docs/t.parquet#1"]["domain"] == "letters"
    assert "L'été à la plage, schön für alle über vierzig." in kept["docs/bad.txt"]["text"]
    assert "Straße über café déjà naïve Größe schön." in kept["docs/latin.txt"]["text"]
    page = kept["docs/page.html"]["text"]
    assert prose(60)[:50] in page and "Home" not in page and "<" not in page and "var x" not in page
    assert {"docs/a.jsonl#1", "docs/a.jsonl#2", "docs/deep/b.jsonl.gz#1"} <= kept.keys()
    reasons = {name: (document["block"], document["reason"]) for name, document in removed.items()}
    assert reasons["docs/note3.txt"] == ("exact", "same text: docs/copy.md")
    assert reasons["docs/nearer.md"] == ("minhash", "near-duplicate: docs/near.md")
    assert reasons["docs/a.jsonl#3"] == ("read", "record without a text field")
    assert reasons["docs/a.jsonl#4"] == ("read", "record is no object with fields")
    assert reasons["docs/a.jsonl#5"] == ("read", "record is not JSON")
    assert reasons["docs/t.parquet#2"] == ("read", "record without a text field")
    assert reasons["docs/photo.png"] == ("read", "binary file: .png")
    assert reasons["docs/cut.txt.gz"] == ("read", "damaged gz file")
    assert reasons["docs/broken.parquet"][1].startswith("damaged Parquet file")
    assert len(reasons) == 9 and not any("hidden" in name or ".git" in name for name in (kept | removed))
    table = json.loads((out / "table.json").read_text())
    assert sum(row["documents"] for row in table["rows"]) == len(kept) + len(removed)
    assert [step["block"] for step in table["blocks"]] == ["read", *curate.BLOCKS]
    assert table["blocks"][0]["removed"] == 7 and table["blocks"][-1]["kept"] == len(kept)
    assert metrics["documents_train"] == len(train) and metrics["documents_removed"] == 9


def test_same_bytes_twice_and_wherever_the_folder_lies(folder, tmp_path):
    other = tmp_path / "elsewhere" / "docs"
    other.parent.mkdir()
    folder.rename(other)
    first, _ = run(tmp_path, sources=[str(other)], source_bytes=20_000, seed=3)
    identity = curate.external(curate.Config(sources=[str(other)], source_bytes=20_000, seed=3))
    other.rename(folder)
    second, _ = run(tmp_path, sources=[str(folder)], source_bytes=20_000, seed=3)
    files = sorted(path.name for path in first.iterdir())
    assert files == ["decontaminated.json", "heldout-00000.parquet", "removed-00000.parquet", "samples.json", "table.json", "train-00000.parquet"]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    assert curate.external(curate.Config(sources=[str(folder)], source_bytes=20_000, seed=3)) == identity
    assert "sources" not in __import__("stages.stage", fromlist=["x"]).identity(curate.Config())


def test_odd_names_and_characters(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a b ü.txt").write_text(prose(1))
    with open(bytes(docs) + b"/odd\xff.txt", "w") as file:
        file.write(prose(2))
    (docs / "s.jsonl").write_text('{"text": "a lone \\ud800 surrogate"}\n' + json.dumps({"text": prose(3)}))
    out, _ = run(tmp_path, sources=[str(docs)])
    found = ids(out, "train") | ids(out, "heldout")
    assert found.keys() == {"docs/a b ü.txt", "docs/odd?.txt", "docs/s.jsonl#2"}
    assert ids(out, "removed")["docs/s.jsonl#1"]["text"] == "a lone ? surrogate"


def test_identity_follows_content_and_what_is_taken(folder):
    def digest(**values):
        return curate.external(curate.Config(sources=[str(folder)], **values))["sources"][0]["sha256"]

    assert curate.external(curate.Config(sources=[str(folder)]))["libraries"].keys() == {"fastwarc", "ftfy", "py3langid", "pypdf", "resiliparse"}
    before, limited = digest(), {seed: digest(source_documents=3, seed=seed) for seed in (0, 1)}
    assert limited[0] != limited[1] != before
    path = folder / "note1.txt"
    path.write_text(path.read_text() + "more")
    assert digest() != before
    path.rename(folder / "renamed.txt")
    assert digest() not in (before, "")


def test_the_digest_of_a_large_file_is_remembered_until_it_changes(tmp_path, monkeypatch):
    from stages.data.sources import _files

    path, state, read = tmp_path / "big.txt", tmp_path / "state", []
    monkeypatch.setenv("CUVEE_STATE", str(state))
    opened = _files.Entry.open
    monkeypatch.setattr(_files.Entry, "open", lambda self: read.append(self.name) or opened(self))

    def reads(text: str, age: float) -> int:
        path.write_text(text)
        os.utime(path, (time.time() - age,) * 2)
        (entry,) = _files.entries(str(path))
        assert entry.digest() == entry.digest() == hashlib.sha256(text.encode()).hexdigest()
        count, read[:] = len(read), []
        return count

    size = _files.LARGE
    assert reads("a" * size, 100) == 2  # without a state directory
    state.mkdir()
    assert [reads("a" * size, 100), reads("b" * size, 100), reads("c" * (size - 1), 100), reads("d" * size, 0)] == [1, 1, 2, 2]


def test_limits(folder, tmp_path):
    lines = "".join(json.dumps({"text": prose(1000 + i)}) + "\n" for i in range(50))
    (tmp_path / "big.jsonl").write_text(lines)
    source = str(tmp_path / "big.jsonl")
    for values, least, most in (({"source_bytes": len(lines) // 5}, 7, 10), ({"source_documents": 7}, 7, 7)):
        out, _ = run(tmp_path, sources=[source], **values)
        read = json.loads((out / "table.json").read_text())["blocks"][0]
        assert least <= read["kept"] + read["removed"] <= most
        assert not any("read" == document["block"] for document in corpus.documents(out, "removed"))
    before = curate.external(curate.Config(sources=[source], source_bytes=1000))
    with open(source, "a") as file:
        file.write("what lies behind the limit does not matter\n")
    assert curate.external(curate.Config(sources=[source], source_bytes=1000)) == before


def test_benchmarks_are_kept_out(folder, tmp_path):
    (tmp_path / "bench.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": prose(5)}], "answer": "yes"}))
    for blocks in (["minhash", "split"], ["split", "decontaminate"]):
        out, _ = run(tmp_path, sources=[str(folder)], benchmarks=[str(tmp_path / "bench.jsonl")], blocks=blocks)
        removed = ids(out, "removed")
        assert removed["docs/note5.txt"]["block"] in blocks and "bench.jsonl#1" in removed["docs/note5.txt"]["reason"]
        told = json.loads((out / "decontaminated.json").read_text())
        digest = hashlib.sha256((tmp_path / "bench.jsonl").read_bytes()).hexdigest()
        assert told["suites"] == [{"label": "bench.jsonl", "file": "bench.jsonl", "digest": digest}]
        assert (told["ngrams"] is None, told["minhash"] is None) == ("split" == blocks[-1], "split" == blocks[0]) and told["heldout"] == (blocks[0] == "split")
        assert not any(name.startswith("bench") for split in ("train", "heldout", "removed") for name in ids(out, split))


def test_the_default_corpus(tmp_path):
    values = {"source_bytes": 400_000, "options": {"split": {"heldout": 0.05}}}
    start = time.process_time()
    identity = curate.external(parse(curate.Config, {"source_bytes": 6_500_000}, "x"))
    assert time.process_time() - start < 1.0  # 0.06 s on an idle machine
    assert [source["label"] for source in identity["sources"]] == ["stdlib", "cldr"]
    out, _ = run(tmp_path, **values)
    train = list(corpus.documents(out, "train"))
    assert {document["domain"] for document in train} == {"code", "prose", "names"}
    named = {document["language"] for document in train if document["domain"] == "names"}
    assert len(named) == 23
    german = "".join(document["text"] for document in train if document["id"].startswith("cldr/de/territories"))
    assert "Germany: Deutschland\n" in german


def test_a_module_and_its_docstrings_share_a_split(tmp_path):
    out, _ = run(tmp_path, sources=["stdlib"], source_bytes=1_500_000, options={"split": {"heldout": 0.3}})
    sides = {split: {name.split("#")[0] for name in ids(out, split) if "topics" not in name} for split in ("train", "heldout")}
    assert sides["heldout"] and not sides["train"] & sides["heldout"]


@pytest.mark.parametrize("values, sentence", [
    ({"sources": []}, "sources: is empty"),
    ({"sources": ["stdlb"]}, "did you mean 'stdlib'"),
    ({"sources": ["/no/such/place"]}, "'/no/such/place' is not known; allowed: cldr, stdlib, an existing file or folder"),
    ({"source_bytes": -1}, "source_bytes: -1 is negative"),
    ({"blocks": ["exact"]}, "'split' is missing"),
    ({"blocks": ["split", "exact", "exact"]}, "'exact' stands there twice"),
    ({"blocks": ["decontaminate", "split"]}, "stands before 'split'"),
    ({"blocks": ["splitt"]}, "did you mean 'split'"),
    ({"options": {"qualty": {}}}, "did you mean 'quality'"),
    ({"options": {"quality": {"min_word": 3}}}, "options.quality.min_word: 'min_word' is not known; did you mean 'min_words'"),
    ({"options": {"split": {"heldout": 1.0}}}, "heldout: 1.0 is no share"),
    ({"options": {"minhash": {"bands": 0}}}, "minhash.bands: 0 is below 1"),
    ({"options": {"decontaminate": {"ngram": 0}}}, "ngram: 0 is below 1"),
])
def test_refused_configurations(tmp_path, values, sentence):
    with pytest.raises(ConfigError) as error:
        run(tmp_path, **values)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_refused_sources(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CuveeError, match="holds no file with content"):
        run(tmp_path, sources=[str(empty)])
    (empty / "zero.txt").touch()
    with pytest.raises(CuveeError, match="holds no file with content"):
        run(tmp_path, sources=[str(empty)])
    (empty / "image.bin").write_bytes(b"\0\1\2")
    with pytest.raises(CuveeError, match="block 'read' removed 1 of 1, most for 'binary file'; give text"):
        run(tmp_path, sources=[str(empty)])
    (empty / "short.txt").write_text("Too short a text.")
    with pytest.raises(CuveeError, match="block 'quality' removed 2 of 3, most for 'number of words'; .*loosen"):
        run(tmp_path, sources=[str(empty / "short.txt"), str(empty)], blocks=["quality", "split"])
    with pytest.raises(CuveeError, match="3 bytes are too few for any file"):
        run(tmp_path, sources=[str(empty / "short.txt")], source_bytes=3)
    (empty / "book.txt").write_text(prose(1))
    with pytest.raises(CuveeError, match="1 documents are left and none could be held out; give at least two"):
        run(tmp_path, sources=[str(empty / "book.txt")])
    out, _ = run(tmp_path, sources=[str(empty / "book.txt")], options={"split": {"heldout": 0}})
    assert len(ids(out, "train")) == 1 and not ids(out, "heldout")


def test_a_closed_file(tmp_path, monkeypatch):
    """Root may read everything, so the refusal comes from a patched open."""
    path = tmp_path / "secret.txt"
    path.write_text(prose(1))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("stages.data.sources._files.open", refuse, raising=False)
    with pytest.raises(CuveeError, match=r"secret.txt cannot be read \(Permission denied\); mend its permissions"):
        curate.external(curate.Config(sources=[str(path)]))


def test_every_builtin_source_reads(tmp_path):
    assert names("data/sources") == ["cldr", "stdlib"]


def broken_off_connections_are_tried_again():
    """A line, a table and a jump, in requests of 1000 bytes of which every third breaks off in the middle of the answer."""
    from botocore.exceptions import ResponseStreamingError

    from stages.data import source
    from stages.data.sources import _s3

    class Client:
        real, count = _s3.client(), 0

        def get_object(self, **asked):
            Client.count += 1
            if Client.count % 3 == 0:
                raise ResponseStreamingError(error="connection broken")
            return self.real.get_object(**asked)

    (found,) = source.find(["s3://lake/texts/more.jsonl"])
    whole = [document.text for shard in found.shards("") for document in shard.documents()]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(_s3, "client", Client)
        monkeypatch.setattr(_s3, "BLOCK", 1000)
        monkeypatch.setattr(_s3, "PAUSES", (0, 0))
        monkeypatch.setattr(source, "SHARD", 3000)
        shards = found.shards("")
        assert len(shards) > 3 and [document.text for shard in shards for document in shard.documents()] == whole == [prose(10 + i) for i in range(20)]
        with found.entries[0].open() as file:
            data = file.read()
            file.seek(-100, 2)
            assert Client.count > 5 and len(data) == found.entries[0].size and file.read() == data[-100:] and file.read() == b""


def test_s3(tmp_path, monkeypatch):
    moto = pytest.importorskip("moto")
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with moto.mock_aws():
        client = boto3.client("s3")
        client.create_bucket(Bucket="lake")
        for i in range(3):
            client.put_object(Bucket="lake", Key=f"texts/deep/{i}.txt", Body=prose(i).encode())
        lines = "".join(json.dumps({"text": prose(10 + i)}) + "\n" for i in range(20))
        client.put_object(Bucket="lake", Key="texts/more.jsonl", Body=lines.encode())
        client.put_object(Bucket="lake", Key="other/x.txt", Body=b"x")
        out, _ = run(tmp_path, sources=["s3://lake/texts/"])
        found = ids(out, "train") | ids(out, "heldout")
        assert len(found) == 23 and "texts/deep/1.txt" in found and "texts/more.jsonl#20" in found
        out, _ = run(tmp_path, sources=["s3://lake/texts/more.jsonl"], source_bytes=len(lines) // 2)
        assert 8 <= len(ids(out, "train") | ids(out, "heldout")) <= 10
        config = curate.Config(sources=["s3://lake/texts"])
        before = curate.external(config)
        client.put_object(Bucket="lake", Key="texts/deep/1.txt", Body=b"changed")
        assert curate.external(config) != before
        broken_off_connections_are_tried_again()
        with pytest.raises(CuveeError, match="s3://nobody/x cannot be read .*AWS_ENDPOINT_URL"):
            curate.external(curate.Config(sources=["s3://nobody/x"]))
        with pytest.raises(CuveeError, match="holds no file"):
            curate.external(curate.Config(sources=["s3://lake/none"]))
