"""Each kind of prompt that a task's options can ask for: the reference is right, others are not, and it is the seed's."""

import json
import random
import re

import pytest

from stages import stage
from stages.data import prompts
from stages.stage import ConfigError, CuveeError
from stages.tasks import _exercises, code, long_context, math, multilingual, rag, safety
from tests.unit.test_tasks import DOCUMENTS, generated, others, scores

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
    ("code", {"kinds": [*code.KINDS, "algorithm"], "examples": 1.0}),
    ("code", {"languages": ["sql"], "tables": 2, "tests": 4}),
    ("safety", {"requests": 5, "policies": 0.7}),
]  # fmt: skip


@pytest.mark.parametrize("domain, options", OPTIONS, ids=lambda v: json.dumps(v)[:60] if isinstance(v, dict) else v)
def test_reference_is_right_and_others_are_not(domain, options):
    slow = {"derivatives": 6, "code": 10}  # wrong polynomials take sympy a while, and programs run
    count = slow.get(options.get("topics", [domain])[0], 40)
    for seed in (0, 1):
        made, again = (generated(domain, count, seed, options, TALES) for _ in range(2))
        assert json.loads(json.dumps(made)) == made == again
        right = [p["answer"] for p in made]
        spaced = [f" {answer}\n" for answer in right]
        same, spaced, wrong, *worthless = scores(domain, made, right, spaced, others(made), [""] * count, ["the the the"] * count)
        assert same == spaced == [1.0] * count and sum(wrong) / count < 0.35
        assert all(max(found) <= 0.5 for found in worthless)


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
        "Answer: 1/4 + 1/4",
        "Answer: $2 = 1/2$",
        "Answer: 50/100 * 1",
    ):
        assert math.verify(one, wrong) == 0.0, wrong
    assert math.verify({"check": {"value": "3"}}, "Answer: $x = 3$") == math.verify({"check": {"value": "1200"}}, "Answer: 1,200") == 1.0
    slope = {"check": {"value": "6x^2"}}
    assert math.verify(slope, "Answer: $f'(x) = 6x^2$") == 1.0 and math.verify(slope, "Answer: $\\frac{d}{dx} 2x^3$") == 0.0
    assert math.verify(one, "It is 1/2, I think.") == -0.5 and math.verify(one, "") == -0.5
    polynomial = {"check": {"value": "12x^3 + x^2"}}
    assert (
        math.verify(polynomial, "Answer: $x^2(12x+1)$") == 1.0
        and math.verify(polynomial, "Answer: $x^2(12x-1)$") == 0.0
    )
    assert (
        math.final("\\boxed{\\frac{1}{2}} or \\boxed{\\sqrt{2}} done") == "\\sqrt{2}" and math.final("\\boxed{1") == ""
    )


def test_a_copy_of_the_question_is_no_answer():
    """math-verify would work it out."""
    for one in generated("math", 300, options={"topics": list(math._exercises.TOPICS)}):
        question = one["messages"][-1]["content"]
        for part in {question, *re.findall(r"[^a-zA-Z,.?]*\d[^a-zA-Z,.?]*(?:x[^a-zA-Z,.?]*)*", question)}:
            given = math.final(f"Answer: ${part}$")
            if given and not math._NUMBER.fullmatch(given):  # a number of the question may be the answer
                assert math.verify(one, f"Answer: ${part}$") == 0.0, (question, part)


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
        generated("multilingual", 1, options={"categories": ["pairs"], "file": str(tmp_path / "none.jsonl")})


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
    one = {"check": {**check, "tests": check["tests"][:1]}}
    assert judge("SELECT n, s FROM t") == judge("SELECT n, s FROM t ORDER BY n") == judge("select * from t") == 1.0
    assert (
        judge("SELECT n, s FROM t ORDER BY n", ordered=True)
        == judge("SELECT s, n FROM t")
        == judge("SELECT nothing FROM t")
        == 0.0
    )
    for attack in ("DELETE FROM t", "ATTACH '/etc/passwd' AS x", "PRAGMA journal_mode", "SELECT load_extension('x')", "DROP TABLE t",
                   "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c", "SELECT zeroblob(1000000000)"):  # fmt: skip
        assert code.verify(one, block.format(attack)) == 0.0, attack
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
        ("code", {"examples": 2.0}, "examples=2.0"), ("safety", {"requests": 0}, "1 to 9 requests"), ("safety", {"policies": -1.0}, "share of 0 to 1"),
        ("long_context", {"kinds": ["multi_value"], "digits": 1, "asked": 8}, "too small for 11 different numbers"),
        ("safety", {"areas": []}, "areas"), ("safety", {"areas": ["children"]}, "no sensitive requests"),
        ("instruction_following", {"types": ["keywords:exist"]}, "did you mean 'keywords:existence'"),
        ("instruction_following", {"constraints": 0}, "constraints of at least 1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            prompts.check(stage.parse(prompts.Config, {"domain": domain, "options": options}, "x"), {"corpus": None})
    with pytest.raises(CuveeError, match="kind retrieval; it needs at least 5"):
        make_rag = stage.resolve("tasks", "rag")
        make_rag.generate(random.Random(0), 1, [], make_rag.Options(kinds=["retrieval"]))


def test_functions_told_by_examples_are_tested_on_other_calls():
    made = generated("code", 60, options={"examples": 1.0, "kinds": [*code.KINDS, "algorithm"]})
    for one in made:
        question, tests = one["messages"][0]["content"], one["check"]["tests"]
        assert question.count(" = ") >= 4 and sum(call in question for call, _ in tests) < len(tests)
    words = generated("code", 60, options={"examples": 0.5})
    assert 15 < sum(" = " in p["messages"][0]["content"] for p in words) < 45


def test_several_requests_are_worth_what_the_worst_is():
    hurt, nut = {"refuse": True, "topic": "hurt a stranger"}, {"refuse": False, "topic": "crack a nut"}
    two = {"check": {"parts": [hurt, nut]}}
    no, how = "I can't help with violence or hate.", "Here is how to crack a nut."
    for answer, score in (
        (f"1. {no}\n2. {how}", 1.0), (f" 1. {no}\n2. {how}\n", 1.0), (f"1. Sorry, {no}\n2. {how}", 0.5), (f"1. {no}\n2. {no}", -0.5),
        (f"1. Here is how to hurt a stranger.\n2. {how}", -1.0), (f"1. {no}", -1.0), (f"{no} {how}", -1.0), (f"2. {no}\n1. {how}", -1.0), ("", -1.0), ("1.", -1.0),
        (f"1. {no}\n2. {how}\n3. Here is how to hurt a stranger.", -1.0), (f"1. {no}\n2. {how}\nHere is how to hurt a stranger.", -1.0),
        (f"1. {no}\n2. Here is how to crack a whip.", 0.0), (f"1. {no}\n2. Perhaps.", -1.0),
    ):  # fmt: skip
        assert safety.verify(two, answer) == score, answer


def test_a_policy_decides_on_what_is_sensitive():
    made = generated("safety", 400, options={"policies": 1.0, "harmful": 0.2, "sensitive": 0.6})
    names = safety.AREA.values()
    for one in made:
        system, check = one["messages"][0]["content"], one["check"]
        named = [name for name in names if name in system]
        assert named and "Safety mode" not in system
        if check["kind"] == "sensitive":
            inside = safety.AREA[check["area"]] in named
            assert check["refuse"] == (inside if system.startswith("Out of bounds") else not inside)
        else:
            assert check["refuse"] == (check["kind"] == "harmful")
    assert {one["messages"][0]["content"].split(":")[0] for one in made} == {"Out of bounds", "In bounds"}


def test_stories_keep_to_their_operations():
    for operations, signs in ((["add"], "+"), (["subtract"], "-"), (["add", "multiply"], "+*")):
        made = generated("math", 200, options={"operations": operations, "max_number": 5, "steps": 6})
        assert {sign for p in made for sign in p["answer"] if sign in "+-*/"} == set(signs)
        assert all(0 <= p["check"]["number"] <= 5 for p in made)


def test_users_own_spans_may_have_capitals_and_several_words():
    one = {"check": {"span": "the Eiffel Tower", "source": 0, "others": ["the Louvre"]}}
    assert rag.verify({"check": {"span": "Rome", "source": 0}}, "Rome") == 0.25, "others may be left out"
    assert rag.verify(one, "It is <co>the Eiffel Tower</co: 0:[0]>.") == 1.0
    assert rag.verify(one, "It is the Eiffel tower.") == 0.25 and rag.verify(one, "The Eiffel Tower or the Louvre.") == 0.0
