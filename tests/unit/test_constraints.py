"""IFEval's instruction types: what follows each of them and what does not, conflicts, and what the generator draws."""

import random
from collections import Counter

import pytest

from stages.tasks import _constraints, instruction_following
from stages.tasks._constraints import CONFLICTS, TYPES, followed

ENGLISH = "There are many old books about the bridges of this town."
CASES = {  # arguments, a text that follows, a text that does not
    "keywords:existence": ({"keywords": ["oak", "C++"]}, "Oak and c++.", "An oak."),
    "keywords:frequency": ({"keyword": "oak", "frequency": 2, "relation": "at least"}, "Oak, oak.", "One oak."),
    "keywords:forbidden_words": ({"forbidden_words": ["oak"]}, "Oaks.", "An Oak."),
    "keywords:letter_frequency": ({"letter": "q", "let_frequency": 2, "let_relation": "less than"}, "Quite.", "Q q."),
    "language:response_language": ({"language": "de"}, "Das ist eine schöne alte Brücke über den Fluss.", ENGLISH),
    "length_constraints:number_sentences": ({"num_sentences": 2, "relation": "at least"}, "One. (Two!)", "Only 3.5 of them."),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb\n***", "a\n***\n\n***\nb"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "less than"}, "two words", "here are three"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "oak"}, "a\n\n'Oak, b", "oak\n\nb"),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] and [b]", "[a]"),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, "x\np. p.s. y", "P.S. y"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n - b\n**c**", "* a"),
    "detectable_format:constrained_response": ({}, "My answer is no.", "No."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a* and *b*", "*a* and **"),
    "detectable_format:multiple_sections": ({"section_spliter": "SECTION", "num_sections": 2}, "SECTION 1 a SECTION 2 b", "Section 1 Section 2"),
    "detectable_format:json_format": ({}, '```json\n{"a": [1]}\n```', '{"a": [1}'),
    "detectable_format:title": ({}, "<<A>>\nb", "<< >>"),
    "combination:two_responses": ({}, "a******b", "a******a"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it."}, " say it. So.", "So. Say it."),
    "startend:end_checker": ({"end_phrase": "The end."}, 'Well, the end."', "The end. Or not."),
    "startend:quotation": ({}, ' "a" ', '"a" b'),
    "change_case:capital_word_frequency": ({"capital_frequency": 1, "capital_relation": "at least"}, "GOOD.", "Good."),
    "change_case:english_capital": ({}, ENGLISH.upper(), ENGLISH),
    "change_case:english_lowercase": ({}, ENGLISH.lower(), ENGLISH),
    "punctuation:no_comma": ({}, "a b", "a, b"),
}  # fmt: skip


def test_there_are_the_25_of_the_paper():
    assert set(CASES) == set(TYPES) and len(TYPES) == 25 and len({name.split(":")[0] for name in TYPES}) == 9


@pytest.mark.parametrize("name", CASES)
def test_type(name):
    arguments, right, wrong = CASES[name]
    nulls = {**arguments, "another_types_argument": None}  # as the published data has them
    assert followed([[name, nulls]], right) == [True] and followed([[name, arguments]], wrong) == [False]
    assert followed([[name, arguments]], " \n") == [False], "an empty response follows nothing"
    assert _constraints.ask(name, arguments)


def test_loose_measure_forgives_an_opening_and_asterisks():
    both = [["startend:quotation", {}], ["punctuation:no_comma", {}]]
    assert followed(both, 'Sure, here it is:\n"a"') == [False, False]
    assert followed(both, 'Sure, here it is:\n"a"', loose=True) == [True, True]
    assert followed([["startend:end_checker", {"end_phrase": "end."}]], "the *end.*", loose=True) == [True]


def test_conflicts_are_symmetric_and_as_published():
    """Sets of one to five types without a conflict, counted from the table as the paper's authors published it: 16,459."""
    assert all(
        name in CONFLICTS[name] and all(name in CONFLICTS[other] for other in others)
        for name, others in CONFLICTS.items()
    )
    names, sets = sorted(TYPES), [()]
    count = 0
    for _ in range(5):
        sets = [(*s, n) for s in sets for n in names if (not s or n > s[-1]) and not any(n in CONFLICTS[o] for o in s)]
        count += len(sets)
    assert count == 16459


def test_generated_requests_use_every_type_and_conflict_nowhere():
    made = instruction_following.generate(random.Random(0), 300, [], instruction_following.Options(constraints=4))
    seen = Counter(name for p in made for name, _ in p["check"]["constraints"])
    assert set(seen) == set(TYPES)
    for one in made:
        names = [name for name, _ in one["check"]["constraints"]]
        assert all(b not in CONFLICTS[a] for a in names for b in names if a != b) and len(set(names)) == len(names)
    assert max(len(p["check"]["constraints"]) for p in made) == 4


def test_off_the_topic_and_copies_earn_nothing():
    one = {"messages": [{"role": "user", "content": "Describe kites. Use no commas."}],
           "check": {"constraints": [["punctuation:no_comma", {}], ["startend:quotation", {}]], "about": "kites"}}  # fmt: skip
    verify = instruction_following.verify
    assert verify(one, '"Kites fly."') == 1.0 and verify(one, "Kites fly.") == 0.25
    assert verify(one, '"Birds fly."') == verify(one, '"Describe kites. Use no commas."') == verify(one, "") == 0.0
