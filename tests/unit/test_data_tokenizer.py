"""Tokenizer and token files: lossless, deterministic, readable by transformers and Megatron-core."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stages.chat.template import END_OF_TURN, SPECIAL_TOKENS, TEMPLATE
from stages.data import corpus, curate, tokenizer, tokens
from stages.data.indexed import IndexedTokens
from stages.stage import Artifact, ConfigError, Context, CuveeError, Kind, parse

CONFIG = tokenizer.Config(vocab_size=600, template="compact")


def artifact(path: Path, kind: Kind) -> Artifact:
    return Artifact(path, kind, "", {})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus of the standard library and CLDR, prompts of one domain, and a tokenizer of both."""
    root = tmp_path_factory.mktemp("data")
    paths = {name: root / name for name in ("corpus", "prompts", "tokenizer")}
    for path in paths.values():
        path.mkdir()
    config = parse(curate.Config, {"source_bytes": 150_000, "options": {"split": {"heldout": 0.1}}}, "x")
    curate.run(config, {}, paths["corpus"], Context(root))
    lines = [{"id": str(i), "domain": "math", "messages": [{"role": "user", "content": f"What is {' zyxwvut' * 20} {i} + 1?"}],
              "answer": f"It is {i + 1}.", "check": {}} for i in range(20)]
    (paths["prompts"] / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {"corpus": artifact(paths["corpus"], Kind.CORPUS), "prompts": {"math": artifact(paths["prompts"], Kind.PROMPTS)}}
    metrics = tokenizer.run(CONFIG, found, paths["tokenizer"], Context(root))
    assert metrics["vocab_size"] == 600 and 1.5 < metrics["bytes_per_token"] < 4
    return found | {"tokenizer": artifact(paths["tokenizer"], Kind.TOKENIZER)}


def load(made):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made["tokenizer"].path)


def test_special_tokens_and_template(made):
    found = load(made)
    assert [found.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert (found.bos_token_id, found.pad_token_id, found.unk_token_id) == (5, 0, 1)
    assert found.eos_token == END_OF_TURN and found.chat_template == TEMPLATE["compact"] and len(found) == 600
    ids = found.apply_chat_template([{"role": "user", "content": "Hello 12"}], add_generation_prompt=True)["input_ids"]
    assert ids[0] == 5 and ids.count(5) == 1
    assert json.loads((made["tokenizer"].path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_beside_a_cohere2_model(made, tmp_path):
    """A checkpoint folder names its architecture; the tokenizer must stay the one that was trained."""
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(made["tokenizer"].path, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "cohere2"}')
    text = "def f(x):\n    return 2025 * é\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(text).input_ids == load(made)(text).input_ids


def test_text_comes_back_and_digits_stand_alone(made):
    found = load(made)
    ids = found(tokenizer.STRESS, add_special_tokens=False).input_ids
    assert found.decode(ids) == tokenizer.STRESS
    pieces = found.convert_ids_to_tokens(found("year 2024x37", add_special_tokens=False).input_ids)
    assert [piece for piece in pieces if any(map(str.isdigit, piece))] == list("202437")
    assert found("a").input_ids[0] == 5


def test_same_bytes_twice(made, tmp_path):
    inputs = {name: made[name] for name in ("corpus", "prompts")}
    tokenizer.run(CONFIG, inputs, tmp_path, Context(tmp_path))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["chat_template.jinja", "fertility.json", "tokenizer.json", "tokenizer_config.json"]
    for name in files:
        assert (tmp_path / name).read_bytes() == (made["tokenizer"].path / name).read_bytes()


def test_prompts_are_seen(made, tmp_path):
    assert sum("zyxwvut" in text for group, text in tokenizer._texts(made["corpus"], made["prompts"]) if group == ("instructions", "math")) == 20
    with_prompts = len(load(made)("zyxwvut", add_special_tokens=False).input_ids)
    tokenizer.run(CONFIG, {"corpus": made["corpus"]}, tmp_path, Context(tmp_path))
    without = len(load({"tokenizer": artifact(tmp_path, Kind.TOKENIZER)})("zyxwvut", add_special_tokens=False).input_ids)
    assert with_prompts < without


def test_fertility(made):
    found = json.loads((made["tokenizer"].path / "fertility.json").read_text())
    assert {"code", "names", "prose"} == {row["domain"] for row in found["by_domain"]}
    assert len({row["language"] for row in found["by_language"]}) >= 5 and len(found["by_language"]) < len(found["by_domain"])
    assert all(row["bytes_per_token"] == pytest.approx(row["bytes"] / row["tokens"], abs=1e-3) for rows in (found["by_domain"], found["by_language"]) for row in rows)
    whole = found["round_trip"]
    held = [document["text"] for document in corpus.documents(made["corpus"].path, "heldout")]
    assert whole["documents"] == len(held) and whole["bytes"] == sum(len(text.encode()) for text in held)
    for rows in (found["by_domain"], found["by_language"]):
        assert sum(row["tokens"] for row in rows) == whole["tokens"]


def test_a_lossy_tokenizer_is_refused(made):
    from tokenizers import Tokenizer, normalizers

    broken = Tokenizer.from_file(str(made["tokenizer"].path / "tokenizer.json"))
    broken.normalizer = normalizers.Lowercase()
    with pytest.raises(CuveeError, match="does not come back from its tokens"):
        tokenizer.fertility(broken, made["corpus"].path)


def test_balance():
    texts = [(group, f"{i:04d}".ljust(100, group[0][0])) for group, count in
             {("code", ""): 900, ("names", "de"): 10, ("prose", "en"): 90}.items() for i in range(count)]  # fmt: skip

    def sampled(budget, power, seed=0):
        sizes = {group: 100 * sum(one == group for one, _ in texts) for group, _ in texts}
        return list(tokenizer.sample(texts, tokenizer.fractions(sizes, budget, power, {}), seed))

    taken = tokenizer.fractions({("code", ""): 90_000, ("names", "de"): 1000, ("prose", "en"): 9000}, 30_000, 0.5, {})
    assert taken["names", "de"] == 1  # the small group whole, the rest 30 : 9.5, of which prose has less
    assert taken["prose", "en"] * 9000 == pytest.approx(29_000 * 90**0.5 / (90**0.5 + 30))
    assert sum(taken[group] * size for group, size in {("code", ""): 90_000, ("names", "de"): 1000, ("prose", "en"): 9000}.items()) == pytest.approx(30_000)
    found = sampled(30_000, 0.5)
    assert sum(text.endswith("n") for text in found) == 10 and 240 < len(found) < 360
    added = tokenizer.fractions({("prose", "en"): 90_000, ("prose", "th"): 90_000, ("prose", "xx"): 9}, 10_000, 0.5, {"th": 4, "xx": 0})
    assert added["prose", "th"] == pytest.approx(4 * added["prose", "en"]) and ("prose", "xx") not in added
    assert len(sampled(10**9, 0.5)) == 1000 and 60 < len(sampled(10_000, 1.0)) < 140
    assert found == [text for text in (text for _, text in texts) if text in set(found)] and found != sampled(30_000, 0.5, seed=1)


def test_the_corpus_is_streamed(made, tmp_path, monkeypatch):
    """Texts are let go of as soon as they are read: no more than a few are alive at once."""
    import weakref

    class Text(str):
        pass

    alive, most = weakref.WeakSet(), 0
    read = corpus.documents

    def documents(path, split):
        nonlocal most
        for document in read(path, split):
            text = Text(document["text"])
            alive.add(text)
            most = max(most, len(alive))
            yield document | {"text": text}

    monkeypatch.setattr(corpus, "documents", documents)
    inputs = {"corpus": made["corpus"]}
    sizes = {}
    for group, text in tokenizer._texts(made["corpus"], {}):
        sizes[group] = sizes.get(group, 0) + len(text)
    assert most <= 3
    most = 0
    tokenizer.run(CONFIG, inputs, tmp_path, Context(tmp_path))
    assert most <= 1100  # what the library reads ahead, and the 256 held-out documents checked at once


@pytest.mark.parametrize("values, sentence", [
    ({"template": "command_b"}, "template: 'command_b' is not known; did you mean 'command_a'"),
    ({"vocab_size": 200}, "vocab_size: 200 is too small for 256 bytes"),
])
def test_refused_configurations(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        tokenizer.check(tokenizer.Config(**values), {})
    with pytest.raises(ConfigError, match="vocab_multiple: 0 is below 1"):
        tokens.check(tokens.Config(vocab_multiple=0), {})
    with pytest.raises(ConfigError, match="prompts_repeat: -1 is negative"):
        tokens.check(tokens.Config(prompts_repeat=-1), {})


def test_token_files(made, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    metrics = tokens.run(tokens.Config(prompts_repeat=3), made, tmp_path, Context(tmp_path))
    table = json.loads((tmp_path / "tokens.json").read_text())
    found = load(made)
    assert table["vocab_size"] == 640
    documents = list(corpus.documents(made["corpus"].path, "train"))
    assert sum(one["documents"] for one in table["sources"].values()) == len(documents) and {one["epochs"] for one in table["sources"].values()} == {1.0}
    assert table["sources"].keys() == {document["source"] for document in documents}
    assert set(table["splits"]["train"]) == {"code", "names", "prose", "instructions"}
    assert set(table["splits"]["heldout"]) == {"code", "names", "prose"}
    assert metrics["tokens_train"] == sum(count["tokens"] for count in table["splits"]["train"].values())
    for split, domains in table["splits"].items():
        for domain, count in domains.items():
            ours, theirs = IndexedTokens(tmp_path / f"{split}-{domain}"), IndexedDataset(str(tmp_path / f"{split}-{domain}"))
            assert len(ours) == len(theirs) == count["documents"] and int(ours.lengths.sum()) == count["tokens"]
            assert all(np.array_equal(ours.document(i), theirs[i]) and ours.document(i)[0] == 5 for i in range(len(ours)))
            assert int(ours.tokens.max()) < 600
    texts = [document["text"] for document in corpus.documents(made["corpus"].path, "train") if document["domain"] == "code"]
    code = IndexedTokens(tmp_path / "train-code")
    assert [found.decode(code.document(i)[1:].tolist()) for i in range(len(code))] == texts
    chats = IndexedTokens(tmp_path / "train-instructions")
    assert len(chats) == 60 and np.array_equal(chats.document(0), chats.document(20))
    assert found.decode(chats.document(4).tolist()).endswith(f"It is 5.{END_OF_TURN}")
    again = tmp_path / "again"
    again.mkdir()
    tokens.run(tokens.Config(prompts_repeat=3), made, again, Context(tmp_path))
    for path in again.rglob("*.*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / path.relative_to(again)).read_bytes()
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == (made["tokenizer"].path / "tokenizer.json").read_bytes()


def test_tokens_and_epochs_of_each_source_are_stated(tmp_path, made):
    """Copies follow one another, over a batch's end as well; the held-out split does not count."""
    import pyarrow
    import pyarrow.parquet

    ids = [f"~/{i}" for i in range(150) for _ in range(3)] + [f"b/{i}" for i in range(7)]
    rows = [{"id": one, "text": f"text {one}", "domain": "code" if one.endswith("3") else "prose", "language": "en", "source": one[0], "url": ""} for one in ids]
    (tmp_path / "corpus").mkdir()
    for split in ("train", "heldout"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "corpus" / f"{split}-00000.parquet")
    out = tmp_path / "out"
    out.mkdir()
    metrics = tokens.run(tokens.Config(), {"corpus": artifact(tmp_path / "corpus", Kind.CORPUS), "tokenizer": made["tokenizer"]}, out, Context(tmp_path))
    found = json.loads((out / "tokens.json").read_text())["sources"]
    assert [(one["documents"], one["epochs"]) for one in (found["~"], found["b"])] == [(450, 3.0), (7, 1.0)]
    assert found["~"]["tokens"] + found["b"]["tokens"] == metrics["tokens_train"] and metrics["epochs/_"] == 3.0


def test_special_tokens_in_a_document_are_text(tmp_path, made):
    import pyarrow
    import pyarrow.parquet

    row = {"id": ["x"], "text": ["see <BOS_TOKEN> and <PAD>"], "domain": ["prose"], "language": ["en"], "source": ["s"]}
    (tmp_path / "corpus").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(row), tmp_path / "corpus" / "train-00000.parquet")
    out = tmp_path / "out"
    out.mkdir()
    inputs = {"corpus": artifact(tmp_path / "corpus", Kind.CORPUS), "tokenizer": made["tokenizer"]}
    tokens.run(tokens.Config(), inputs, out, Context(tmp_path))
    ids = IndexedTokens(out / "train-prose").document(0).tolist()
    assert ids[0] == 5 and not set(ids[1:]) & set(range(len(SPECIAL_TOKENS)))


def test_token_files_do_not_depend_on_the_workers_and_go_on_after_a_crash(made, tmp_path, monkeypatch):
    """Each file of the corpus is encoded once, whoever does it; what is done before a crash stays done."""
    import shutil

    import pyarrow.parquet

    split = tmp_path / "corpus"
    split.mkdir()
    table = pyarrow.parquet.read_table(next(made["corpus"].path.glob("train-*.parquet")))
    for i in range(5):
        part = table.slice(i * len(table) // 5, (i + 1) * len(table) // 5 - i * len(table) // 5)
        pyarrow.parquet.write_table(part, split / f"train-{i:05d}.parquet")
    shutil.copy(next(made["corpus"].path.glob("heldout-*.parquet")), split / "heldout-00000.parquet")
    inputs = {**made, "corpus": artifact(split, Kind.CORPUS)}

    def run(name, **values):
        for folder in ("out", "scratch"):
            (tmp_path / name / folder).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(tmp_path / name / "out")
        (tmp_path / name / "out").mkdir()
        tokens.run(tokens.Config(**values), inputs, tmp_path / name / "out", Context(tmp_path / name / "scratch"))
        return {path.name: path.read_bytes() for path in (tmp_path / name / "out").glob("*.*")}

    expected = run("one", workers=1)
    assert run("two", workers=2) == expected
    (tmp_path / "one" / "scratch" / "tokens" / "train-00003.json").unlink()
    done = []
    encode = tokens._encode_file
    monkeypatch.setattr(tokens, "_encode_file", lambda *args: done.append(args[-1]) or encode(*args))
    assert run("one", workers=1) == expected and len(done) == 1


def test_remembered_words_have_the_ids_of_the_whole_text(made):
    """Word by word and at once give the same, for every text of the corpus, for damage and for random characters."""
    import random

    from tokenizers import Tokenizer

    from stages.data.encoder import Encoder

    file = made["tokenizer"].path / "tokenizer.json"
    encoder, plain = Encoder(file), Tokenizer.from_file(str(file))
    plain.encode_special_tokens = True
    rng = random.Random(0)
    alphabet = [*"abcXYZ012 \n\t'’\"_-.,;:é漢ไ한½²\u00a0\u3000\u200b\x00😀", " ", " ", " a", "'s", " 's", "  ", "\n\n"]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 60))) for _ in range(3000)]
    texts += [tokenizer.STRESS, "".join(SPECIAL_TOKENS), "see <BOS_TOKEN> and <PAD>", "", " ", "a" * 500]
    texts += [document["text"] for split in ("train", "heldout") for document in corpus.documents(made["corpus"].path, split)]
    assert encoder.known and encoder.words == {}
    for _ in range(2):  # first met, then remembered
        found = encoder(texts)
        assert [ids.tolist() for ids in found] == [one.ids for one in plain.encode_batch_fast(texts)]
    assert encoder.words and max(map(len, encoder.words)) <= 40


def test_a_tokenizer_from_elsewhere_encodes_as_it_is(made, tmp_path):
    from stages.data.encoder import Encoder

    settings = json.loads((made["tokenizer"].path / "tokenizer.json").read_text())
    settings["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    (tmp_path / "t.json").write_text(json.dumps(settings))
    encoder = Encoder(tmp_path / "t.json")
    assert not encoder.known and encoder(["one two"])[0].tolist() == encoder.tokenizer.encode("one two").ids
