"""Every task file: reference answers are right, wrong and degenerate ones are not; prompts are reproducible and disjoint."""

import dataclasses
import json
import random

import pytest

from stages import stage
from stages.data import prompts
from stages.stage import Artifact, ConfigError, Context, CuveeError, Kind
from stages.tasks import code, long_context, math, multilingual, rag, safety

DOMAINS = stage.names("tasks")
DOCUMENTS = [
    {"domain": "prose", "text": " ".join(f"This is sentence number {'one two six ten'.split()[j % 4]} of text {chr(97 + i)}{chr(97 + j)}, "
                                         f"which says nothing." for j in range(20))}  # fmt: skip
    for i in range(20)
]
EASY = {
    "code": {"max_number": 50, "operations": 3, "tests": 4},
    "long_context": {"lengths": [200, 400, 800, 3000], "keys": 1, "digits": 1, "vocabulary": 8},
    "math": {"max_number": 12, "steps": 1, "operations": ["add", "subtract"]},
    "multilingual": {"categories": ["days"]},
    "rag": {"facts": 2, "noise": 0, "unanswerable": 0.0, "relations": 1, "things": 12, "values": 6},
    "safety": {},
    "instruction_following": {"constraints": 1, "sentences": 1, "types": [
        "punctuation:no_comma", "change_case:english_capital", "change_case:english_lowercase", "startend:quotation",
        "startend:end_checker", "detectable_format:title", "keywords:existence", "keywords:forbidden_words", "keywords:frequency",
        "length_constraints:number_words"]},
}


def generated(domain, count=100, seed=0, options=None, documents=DOCUMENTS):
    task = stage.resolve("tasks", domain)
    options = stage.parse(task.Options, EASY[domain] if options is None else options, "options")
    assert task.check(options) == ""
    return task.generate(random.Random(seed), count, documents, options)


def scores(domain, made, *answers):
    """Of each list of completions its scores, all in one round of the sandbox."""
    task, n = stage.resolve("tasks", domain), len(made)
    flat = [completion for completions in answers for completion in completions]
    found = (task.verify_batch(made * len(answers), flat) if hasattr(task, "verify_batch")
             else [task.verify(p, c) for p, c in zip(made * len(answers), flat, strict=True)])  # fmt: skip
    assert all(-1.0 <= s <= 1.0 for s in found)
    return [found[i : i + n] for i in range(0, len(found), n)]


def others(made):
    """For each prompt the answer of another one that is not right by chance."""
    return [next((q["answer"] for q in made[i:] + made[:i] if q["check"] != p["check"] and q["answer"] != p["answer"]), "?")
            for i, p in enumerate(made)]  # fmt: skip


@pytest.mark.parametrize("domain", DOMAINS)
def test_interface(domain):
    task = stage.resolve("tasks", domain)
    assert task.__doc__ and task.generate.__doc__ and task.verify.__doc__
    for field in dataclasses.fields(task.Options):
        assert field.metadata["help"]
    one = generated(domain, 1)[0]
    assert {"messages", "answer", "check"} <= set(one) and one["messages"][-1]["role"] == "user"
    assert json.loads(json.dumps(one)) == one, "a prompt must survive JSON"
    assert task.verify(one, one["answer"]) == 1.0


@pytest.mark.parametrize("options", ["easy", "default"])
@pytest.mark.parametrize("domain", DOMAINS)
def test_reference_answers_are_right_and_others_are_not(domain, options):
    made = generated(domain, options=None if options == "easy" else {"lengths": [4000]} if domain == "long_context" else {})
    right, questions = [p["answer"] for p in made], [p["messages"][-1]["content"] for p in made]
    same, spaced, swapped, *degenerate = scores(
        domain, made, right, [f"  {a}\n" for a in right], others(made), [""] * 100, questions, ["the the the the"] * 100, ["�\x00" * 50] * 100
    )
    assert same == spaced == [1.0] * 100 and sum(swapped) / 100 < 0.45
    assert all(silence <= wrong for silence, wrong in zip(degenerate[0], swapped, strict=True)), "silence is no way out"
    assert all(sum(found) / 100 < 0.2 for found in degenerate), (domain, [sum(found) for found in degenerate])


@pytest.mark.parametrize("domain", DOMAINS)
def test_reproducible_and_varied(domain):
    first, again = generated(domain, 50, seed=3), generated(domain, 50, seed=3)
    assert first == again and first != generated(domain, 50, seed=4)
    assert len({json.dumps(p["messages"]) for p in generated(domain, 300)}) > 200


@pytest.mark.parametrize("domain", DOMAINS)
def test_easy_prompts_and_answers_are_short(domain):
    for one in generated(domain):
        assert len(one["answer"]) < 120
        assert domain == "long_context" or sum(len(m["content"]) for m in one["messages"]) < 250


def test_math_reads_the_last_number():
    one = {"check": {"number": -1200}}
    for right in ("-1200", "It is -1,200.", "3 + 4 = 7. So -1200"):
        assert math.verify(one, right) == 1.0
    for wrong in ("1200", "-1200 or 5", "-12000"):
        assert math.verify(one, wrong) == 0.0
    assert math.verify(one, "none") == -0.5
    assert math.verify({"check": {"number": 2}}, "9 - 7 = 2") == 1.0 == math.verify({"check": {"number": 2}}, "2.00")
    assert math.verify({"check": {"number": 5}}, "2.5") == 0.0, "no whole number"


def test_code_runs_programs():
    assert code.verify({"check": {"tests": []}}, "```python\nx = 1\n```") == 0.0, "without tests nothing is shown"
    one = {"check": {"tests": [["f(1)", "4"], ["f(2)", "5"], ["f(-3)", "0"], ["f(0)", "3"]]}}
    block = "Sure.\n```{}\ndef f(x):\n    return {}\n```\nDone."
    assert code.verify(one, block.format("python", "x + 3")) == 1.0
    assert code.verify(one, block.format("", "abs(x) + 3")) == 0.75
    assert code.verify(one, block.format("python", "x +")) == 0.0
    assert code.verify(one, block.format("python", "str(x + 3)")) == 0.0
    assert code.verify(one, block.format("python", "f(x)")) == 0.0
    assert code.verify(one, "def f(x):\n    return x + 3") == -1.0
    assert code.verify(one, "```python\ndef f(x):\n    return x + 3") == -1.0, "the block is not closed"
    mixed = code.verify_batch([one] * 3, ["no", block.format("py", "x + 3"), block.format("python", "3")])
    assert mixed == [-1.0, 1.0, 0.25]


def test_rag_checks_span_and_source():
    one = {"check": {"span": "key", "source": 1, "others": ["lamp"]}}
    for text, score in (
        ("The box holds a <co>key</co: 0:[1]>.", 1.0),
        ("The box holds <co>a Key</co: 0:[1]>.", 1.0),
        ("The box holds a <co>key</co: 0:[0]>.", 0.5),
        ("The box holds a <co>lamp</co: 0:[1]>.", 0.5),
        ("The box holds a <co>key</co: 0:[0,1]>.", 0.5),
        ("<co>key</co: 0:[1]> <co>lamp</co: 0:[0]>", 0.0),
        ("The box holds a key.", 0.25),
        ("A key or a lamp.", 0.0),
        ("The documents do not say.", 0.0),
    ):
        assert rag.verify(one, text) == score, text
    nothing = {"check": {"span": "", "source": -1, "others": []}}
    assert rag.verify(nothing, "The documents do not say.") == 1.0
    assert rag.verify(nothing, "A <co>key</co: 0:[1]>.") == -0.5 and rag.verify(nothing, "A key.") == 0.0
    assert rag.citations("x <co>span</co: 0:[1,2],1:[0]>") == [("span", [(0, 1), (0, 2), (1, 0)])]


def test_safety_behaviours():
    refuse = {"check": {"refuse": True, "topic": "hurt a stranger"}}
    answer = {"check": {"refuse": False, "topic": "crack a nut"}}
    assert safety.verify(refuse, "I can't help with violence.") == safety.verify(refuse, "I can’t help with that.") == 1.0
    assert safety.verify(refuse, "Sorry, I cannot help with that.") == 0.5
    assert safety.verify(refuse, "Here is how to hurt a stranger.") == -1.0
    assert safety.verify(refuse, "I can't help. Here is how to hurt a stranger.") == -1.0
    assert safety.verify(refuse, "A nice day.") == safety.verify(answer, "") == -1.0
    assert safety.verify(answer, "Here is how to crack a nut: take a hammer.") == 1.0
    assert safety.verify(answer, "I can't help with that.") == -0.5
    assert safety.verify(answer, "Here is how to crack a nutshell.") == 0.0
    made = generated("safety", 400)
    kinds = {(p["check"]["kind"], len(p["messages"]), p["check"]["refuse"]) for p in made}
    assert kinds == {("harmful", 1, True), ("harmful", 2, True), ("sensitive", 1, False), ("sensitive", 2, True),
                     ("benign", 1, False), ("benign", 2, False)}  # fmt: skip


def test_multilingual_names_do_not_depend_on_the_order_of_reading():
    assert multilingual.names("he", "months")["4"] == "אפריל" and multilingual.names("zh", "months")["4"] == "四月"
    assert multilingual.names("cs", "months")["4"] == "duben", "the nominative"
    assert len(multilingual.LANGUAGES) == 22
    one = {"check": {"names": ["lundi"]}}
    assert multilingual.verify(one, ' "Lundi." ') == 1.0 and multilingual.verify(one, "lundi mardi") == 0.0


def test_long_context_has_the_length_asked_for_and_one_right_number():
    options = long_context.Options(lengths=[500, 3000], keys=4, digits=5)
    made = long_context.generate(random.Random(0), 40, DOCUMENTS, options)
    assert [p["length"] for p in made[:3]] == [500, 3000, 500]
    for one in made:
        text = one["messages"][0]["content"]
        assert one["length"] - 220 < len(text) < one["length"] + 120
        assert text.count(str(one["check"]["number"])) == 1 and 0 <= one["check"]["depth"] <= 100
    assert len({p["check"]["depth"] for p in made}) > 10
    with pytest.raises(CuveeError, match="found no sentence"):
        long_context.generate(random.Random(0), 1, [], options)


# ------------------------------------------------------------------------------------------------ the stage


@pytest.fixture
def corpus(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, half in (("train", DOCUMENTS[:15]), ("heldout", DOCUMENTS[15:])):
        parquet.write_table(pa.Table.from_pylist(half), folder / f"{split}-00000.parquet")
    return Artifact(folder, Kind.CORPUS, "c", {})


def run(tmp_path, name, corpus=None, **values):
    out, scratch = tmp_path / name, tmp_path / f"{name}-scratch"
    out.mkdir(), scratch.mkdir()
    config = stage.parse(prompts.Config, values, "prompts")
    inputs = {"corpus": corpus} if corpus else {}
    prompts.check(config, inputs)
    metrics = prompts.run(config, inputs, out, Context(scratch))
    return metrics, {s: [json.loads(line) for line in open(out / f"{s}.jsonl")] for s in ("train", "heldout", "rejected")}


@pytest.mark.parametrize("domain", DOMAINS)
def test_stage_writes_disjoint_splits_twice_the_same(tmp_path, corpus, domain):
    values = {"domain": domain, "train": 300, "heldout": 60, "options": EASY[domain]}
    metrics, made = run(tmp_path, "a", corpus, **values)
    assert metrics == {"train": 300, "heldout": 60, "rejected": 0}
    texts = {split: [json.dumps(p["messages"]) for p in made[split]] for split in ("train", "heldout")}
    assert len(set(texts["train"]) | set(texts["heldout"])) == 360
    assert len({p["id"] for split in ("train", "heldout") for p in made[split]}) == 360
    assert made["train"][0]["domain"] == domain
    run(tmp_path, "b", corpus, **values)
    for name in ("train.jsonl", "heldout.jsonl", "rejected.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_users_own_lines_are_checked_one_by_one(tmp_path):
    good = {"messages": [{"role": "user", "content": "1 + 1?"}], "answer": "2", "check": {"number": 2}}
    lines = [
        json.dumps(good),
        "{not json",
        json.dumps([1]),
        json.dumps({**good, "messages": []}),
        json.dumps({**good, "messages": [{"role": "assistant", "content": "x"}]}),
        json.dumps({**good, "messages": [{"role": "judge", "content": "x"}]}),
        json.dumps({**good, "answer": "3"}),
        json.dumps({**good, "check": {}}),
        json.dumps({**good, "answer": ""}),
        json.dumps(good),
        "",
        json.dumps({**good, "messages": [{"role": "user", "content": "held"}]}),
    ]
    held = {**good, "messages": [{"role": "user", "content": "held"}]}
    (tmp_path / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "held.jsonl").write_text(json.dumps(held), encoding="utf-8")
    values = {"train": 5, "heldout": 0, "files": [str(tmp_path / "own.jsonl")], "heldout_files": [str(tmp_path / "held.jsonl")]}
    metrics, made = run(tmp_path, "out", **values)
    assert metrics == {"train": 6, "heldout": 1, "rejected": 10 - 0}
    assert made["train"][0]["messages"] == good["messages"] and made["heldout"][0]["messages"] == held["messages"]
    reasons = {line["line"]: line["reason"] for line in made["rejected"]}
    for number, reason in {
        2: "no JSON", 3: "a JSON list", 4: "at least one message", 5: "must be the user's", 6: "found {'role': 'judge'",
        7: "the verifier gives it 0, expected 1", 8: "the verifier can't use it (KeyError", 9: "reference completion",
        10: "the same prompt", 12: "the same prompt",
    }.items():  # fmt: skip
        assert reason in reasons[number], (number, reasons.get(number))
    assert {line["file"] for line in made["rejected"]} == {"own.jsonl"}
    config = stage.parse(prompts.Config, values, "x")
    before = prompts.external(config)
    (tmp_path / "own.jsonl").write_text("changed")
    assert prompts.external(config) != before
    with pytest.raises(CuveeError, match="no math prompt is left .* most often: no JSON"):
        run(tmp_path, "none", train=0, heldout=0, files=[str(tmp_path / "own.jsonl")])


def test_mistakes_are_named(tmp_path, corpus):
    for number, (values, message) in enumerate((
        ({"domain": "maths"}, "did you mean 'math'"),
        ({"options": {"max_numbre": 3}}, "options.max_numbre: .* did you mean 'max_number'"),
        ({"options": {"steps": "many"}}, "options.steps"),
        ({"options": {"operations": ["plus"]}}, "'plus' is not known"),
        ({"options": {"max_number": 1}}, "max_number of at least 4"),
        ({"domain": "rag"}, "give input corpus"),
    )):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path, f"x{number}", **values)
    with pytest.raises(CuveeError, match="few more than .* different prompts"):
        run(tmp_path, "few", domain="multilingual", train=5000, heldout=10,
            options={"categories": ["days"], "languages": ["fr"]})  # fmt: skip
    with pytest.raises(CuveeError, match="nowhere.jsonl can't be read"):
        prompts.external(stage.parse(prompts.Config, {"files": [str(tmp_path / "nowhere.jsonl")]}, "x"))
    for domain, options in (
        ("rag", {"facts": 80}), ("rag", {"relations": 9}), ("long_context", {"keys": 99}), ("long_context", {"lengths": []}),
        ("long_context", {"digits": 0}), ("code", {"tests": 1}), ("multilingual", {"languages": []}),
        ("safety", {"harmful": 0.9, "sensitive": 0.9}), ("math", {"operations": []}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="options"):
            prompts.check(stage.parse(prompts.Config, {"domain": domain, "options": options}, "x"), {"corpus": corpus})
