"""Each kind of prompt that a task's options can ask for: the reference is right, others are not, and it is the seed's."""

import json
import random

import pytest

from stages import stage
from stages.data import prompts
from stages.stage import ConfigError, CuveeError
from stages.tasks import _exercises, code, long_context, math, multilingual
from tests.unit.test_tasks import DOCUMENTS

TALES = [{"domain": "prose", "text": " ".join(f"In tale {i} the miller's son met traveller number {j}, and they spoke of {w}."
                                              for j, w in enumerate("bread wine snow gold ships wolves rain songs".split()))}
         for i in range(60)]  # fmt: skip
OPTIONS = [
    ("math", {"topics": [topic], "levels": [level]}) for topic in _exercises.TOPICS for level in (1, 2, 3)
] + [
    ("math", {"topics": list(math.TOPICS)}),
    *(("rag", {"kinds": [kind], "form": form}) for kind in ("facts", "retrieval", "agent") for form in ("text", "template")),
    ("rag", {"kinds": ["facts", "retrieval", "agent"], "pool": 30, "facts": 8, "relations": 2}),
    ("rag", {"kinds": ["agent"], "facts": 2, "noise": 0, "relations": 1}),
    *(("long_context", {"kinds": [kind], "lengths": [2000, 5000]}) for kind in long_context.KINDS),
    *(("long_context", {"kinds": [kind], "lengths": [900], "asked": 2, "keys": 2}) for kind in long_context.KINDS),
    *(("multilingual", {"categories": [kind]}) for kind in multilingual.KINDS if kind != "pairs"),
    ("safety", {"reformulations": 1.0, "areas": ["self-harm", "children"], "personas": 1.0}),
    ("instruction_following", {"constraints": 6, "sentences": 8}),
    ("code", {"kinds": ["algorithm"]}),
    ("code", {"languages": ["sql"], "tables": 2}),
]  # fmt: skip


def make(domain, options, seed=0, count=40):
    task = stage.resolve("tasks", domain)
    parsed = stage.parse(task.Options, options, "options")
    assert task.check(parsed) == ""
    return task, task.generate(random.Random(seed), count, TALES, parsed)


def judge(task, made, completions):
    if hasattr(task, "verify_batch"):
        return task.verify_batch(made, completions)
    return [task.verify(p, c) for p, c in zip(made, completions, strict=True)]


@pytest.mark.parametrize("domain, options", OPTIONS, ids=lambda v: json.dumps(v)[:60] if isinstance(v, dict) else v)
def test_reference_is_right_and_others_are_not(domain, options):
    count = 6 if options.get("topics") == ["derivatives"] else 40  # wrong polynomials take sympy a while
    for seed in (0, 1):
        task, made = make(domain, options, seed, count)
        assert json.loads(json.dumps(made)) == made == make(domain, options, seed, count)[1]
        assert judge(task, made, [p["answer"] for p in made]) == [1.0] * len(made)
        assert judge(task, made, [f" {p['answer']}\n" for p in made]) == [1.0] * len(made)
        wrong = [next((q["answer"] for q in made[i:] + made[:i] if q["check"] != p["check"] and q["answer"] != p["answer"]), "?")
                 for i, p in enumerate(made)]  # fmt: skip
        found = judge(task, made, wrong)
        assert sum(found) / len(found) < 0.35 and all(-1.0 <= s <= 1.0 for s in found), (domain, options)
        for worthless in ("", "the the the"):
            assert max(judge(task, made, [worthless] * len(made))) <= 0.5


def test_exercises_are_right():
    """Where the question is an expression, Python agrees with the answer."""
    from fractions import Fraction

    rng = random.Random(0)
    for _ in range(200):
        question, _, value = _exercises.expressions(rng, rng.randint(1, 3))
        assert eval(question.removeprefix("Calculate ").removesuffix(".")) == int(value)
        question, _, value = _exercises.fractions(rng, rng.randint(1, 3))
        p, symbol, q = question.removeprefix("What is ").split(" as ")[0].split(" ")
        wanted = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, ":": Fraction.__truediv__}[
            symbol
        ](Fraction(p), Fraction(q))
        assert math.verify({"check": {"value": value}}, f"Answer: {wanted}") == 1.0, (question, value)


def test_math_answers_in_other_forms_and_those_that_would_never_end():
    one = {"check": {"value": "\\frac{1}{2}"}}
    for right in (
        "Answer: 1/2",
        "Answer: $0.5$.",
        "so \\boxed{\\frac{2}{4}}",
        "The answer is 0.50",
        "Answer: 2. No: \\boxed{\\dfrac{1}{2}}",
    ):
        assert math.verify(one, right) == 1.0, right
    for wrong in (
        "Answer: 2",
        "Answer: 1/3",
        "\\boxed{1}",
        "Answer: 9^{9^{9^9}}",
        "Answer: 10^10^10^10",
        "Answer: (99!)!",
        "Answer: \\sum_{i=1}^{9} i",
    ):
        assert math.verify(one, wrong) == 0.0, wrong
    assert math.verify(one, "It is 1/2, I think.") == -0.5 and math.verify(one, "") == -0.5
    polynomial = {"check": {"value": "12x^3 + x^2"}}
    assert (
        math.verify(polynomial, "Answer: $x^2(12x+1)$") == 1.0
        and math.verify(polynomial, "Answer: $x^2(12x-1)$") == 0.0
    )
    assert (
        math.final("\\boxed{\\frac{1}{2}} or \\boxed{\\sqrt{2}} done") == "\\sqrt{2}" and math.final("\\boxed{1") == ""
    )


def test_long_context_counts_shares_and_wrong_ones():
    values = {"check": {"numbers": [11, 22, 33, 44]}}
    assert long_context.verify(values, "44, 11, 22, 33") == 1.0 and long_context.verify(values, "11 and 22") == 0.5
    assert long_context.verify(values, "11, 22, 33, 44 and 55") == 0.0 and long_context.verify(values, "None.") == -0.5
    ordered = {"check": {"numbers": [11, 22], "ordered": True}}
    assert long_context.verify(ordered, "11, then 22") == 1.0 and long_context.verify(ordered, "22, then 11") == 0.0
    names = {"check": {"words": ["VAR_OAK", "VAR_FIR"]}}
    assert (
        long_context.verify(names, "VAR_FIR and VAR_OAK") == 1.0
        and long_context.verify(names, "VAR_FIR, VAR_ELM") == 0.0
    )
    town = {"check": {"words": ["Arden"], "among": ["Arden", "Oakham"]}}
    assert (
        long_context.verify(town, "She works in Arden.") == 1.0 and long_context.verify(town, "Arden or Oakham") == 0.0
    )
    chain = long_context.Options(kinds=["variables"], lengths=[4000], asked=3)
    for one in long_context.generate(random.Random(0), 20, DOCUMENTS, chain):
        text, given = one["messages"][0]["content"], {}
        for line in __import__("re").findall(r"(VAR_\w+) = (\w+)\.", text):
            given[line[0]] = given.get(line[1], line[1])  # follows the text from its beginning to its end
        asked = next(word for word in text.split() if word.rstrip(",").isdigit() and f"value {word}" in text).rstrip(
            ","
        )
        assert {name for name, value in given.items() if value == asked} == set(one["check"]["words"])


def test_multilingual_pairs_come_from_the_users_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"en": f"The cat saw {n} birds.", "de": f"Die Katze sah {n} Vögel."} for n in range(2, 60)]
    rows += [{"source": "Guten Tag.", "target": "Bonjour.", "from": "de", "to": "fr"}, {"en": "x", "tlh": "y"}]
    file.write_text("nonsense\n[1]\n" + "\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    options = {"categories": ["pairs"], "file": str(file)}
    config = stage.parse(
        prompts.Config, {"domain": "multilingual", "train": 60, "heldout": 20, "options": options}, "x"
    )
    assert list(prompts.external(config)) == [str(file)]
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir(), scratch.mkdir()
    prompts.run(config, {}, out, stage.Context(scratch))
    found = {split: [json.loads(line) for line in open(out / f"{split}.jsonl")] for split in ("train", "heldout")}
    asked = {split: {p["messages"][0]["content"] for p in rows} for split, rows in found.items()}
    assert len(asked["train"]) == 60 and len(asked["heldout"]) == 20 and not asked["train"] & asked["heldout"]
    for one in found["train"]:
        assert multilingual.verify(one, one["answer"]) == 1.0 and multilingual.verify(one, "") == 0.0
        assert 0.0 < multilingual.verify(one, one["answer"].replace("a", "o")) < 1.0
    (tmp_path / "none.jsonl").write_text("{}\n")
    with pytest.raises(CuveeError, match="holds no pair"):
        make("multilingual", {"categories": ["pairs"], "file": str(tmp_path / "none.jsonl")})


def test_chrf():
    """sacrebleu 2.6.0's sentence_score gives 37.5647 for this pair."""
    assert multilingual.chrf("the cat sat on mat", "the cat is on the mat") == pytest.approx(0.375647, abs=1e-6)
    assert multilingual.chrf("", "x") == multilingual.chrf("y", "x") == 0.0 and multilingual.chrf("a b", "ab") == 1.0


def test_dates_and_numbers_take_plain_spaces_for_narrow_ones():
    one = {"check": {"names": ["1\u202f259\u202f862"]}}
    assert multilingual.verify(one, "1 259 862") == multilingual.verify(one, "1\u00a0259\u00a0862") == 1.0
    assert multilingual.verify(one, "1,259,862") == 0.0


def test_sql_rows_count_and_their_order_only_where_it_is_asked():
    setup = "CREATE TABLE t(n INTEGER, s TEXT); INSERT INTO t VALUES (2, 'b'), (1, 'a'), (3, NULL);"
    check = {"written_in": "sql", "tests": [[setup, "[(2, 'b'), (1, 'a'), (3, None)]"]] * 4}
    block = "```sql\n{};\n```"
    judge = lambda query, ordered=False: code.verify({"check": {**check, "ordered": ordered}}, block.format(query))  # noqa: E731
    assert judge("SELECT n, s FROM t") == judge("SELECT n, s FROM t ORDER BY n") == judge("select * from t") == 1.0
    assert (
        judge("SELECT n, s FROM t ORDER BY n", ordered=True)
        == judge("SELECT s, n FROM t")
        == judge("SELECT nothing FROM t")
        == 0.0
    )
    for attack in ("DELETE FROM t", "ATTACH '/etc/passwd' AS x", "PRAGMA journal_mode", "SELECT load_extension('x')", "DROP TABLE t",
                   "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c", "SELECT zeroblob(1000000000)"):  # fmt: skip
        assert judge(attack) == 0.0, attack
    assert code.verify({"check": check}, "SELECT n, s FROM t") == -1.0


def test_mistakes_in_options_are_named():
    for domain, options, message in (
        ("code", {"languages": []}, "at least one language"), ("code", {"languages": ["cobol"]}, "'cobol' is not known"),
        ("code", {"languages": ["java"], "kinds": ["algorithm"]}, "for Python alone"),
        ("code", {"languages": ["java"], "max_number": 10**6}, "2\\*\\*53"),
        ("math", {"topics": ["algebra"]}, "'algebra' is not known"), ("math", {"levels": [4]}, "levels of 1, 2 or 3"),
        ("rag", {"kinds": []}, "at least 1"), ("rag", {"pool": 2}, "a pool of at least facts=5"), ("rag", {"form": "html"}, "'html' is not known"),
        ("long_context", {"kinds": ["multi_query"], "asked": 5}, "raise keys or lower asked"),
        ("multilingual", {"categories": ["pairs"]}, "needs a file"), ("multilingual", {"file": "x.jsonl"}, "needs a file"),
        ("safety", {"areas": []}, "areas"), ("safety", {"areas": ["children"]}, "no sensitive requests"),
        ("instruction_following", {"types": ["keywords:exist"]}, "did you mean 'keywords:existence'"),
        ("instruction_following", {"constraints": 0}, "constraints of at least 1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            prompts.check(stage.parse(prompts.Config, {"domain": domain, "options": options}, "x"), {"corpus": None})
    with pytest.raises(CuveeError, match="kind retrieval; it needs at least 5"):
        make_rag = stage.resolve("tasks", "rag")
        make_rag.generate(random.Random(0), 1, [], make_rag.Options(kinds=["retrieval"]))
