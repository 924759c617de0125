"""Passages that occur again: against the plain loop, across parts of the join, and what is left of a text."""

from __future__ import annotations

import random

import numpy as np
import pytest

from stages.data import join
from stages.data.blocks import substring
from stages.data.document import Document
from stages.data.engine import select
from stages.data.words import Words
from stages.stage import ConfigError

from test_data_curate import prose  # isort: skip


def naive_passages(texts: list[list[str]], n: int) -> list[list[str]]:
    """What is left of each text (words) when every run of n words that occurred before is cut."""
    seen, left = set(), []
    for words in texts:
        runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        cut = set()
        for i, run in enumerate(runs):
            cut |= set(range(i, i + n)) if run in seen else set()
            seen.add(run)
        left.append([word for i, word in enumerate(words) if i not in cut])
    return left


@pytest.mark.parametrize("rows", [join.ROWS, 500])
def test_passages_that_occur_again_go(monkeypatch, rows):
    """Against the plain loop, on texts put together of passages that return, within texts and across them."""
    monkeypatch.setattr(join, "ROWS", rows)
    rng = random.Random(0)
    passages = [[f"w{rng.randrange(5000)}" for _ in range(rng.randint(8, 45))] for _ in range(60)]
    texts = [[word for _ in range(rng.randint(3, 9)) for word in rng.choice(passages)] for _ in range(80)]
    documents = [Document(str(i), " ".join(word if rng.random() < 0.9 else f"{word.upper()}," for word in words)) for i, words in enumerate(texts)]
    documents += [Document("code", documents[0].text, "code"), Document("bench", documents[0].text, split="benchmark")]
    assert select("substring", documents, substring.Config(words=20, min_characters=0)) == [""] * 82
    found = [document.text.lower().replace(",", "").split() for document in documents[:80]]
    assert found == naive_passages(texts, 20) and sum(map(len, found)) < 0.8 * sum(map(len, texts))
    assert documents[80].text == documents[81].text and len(documents[80].text.split()) == len(texts[0])


def test_what_is_left_of_a_page_of_borrowed_passages():
    own, borrowed = "A sentence of its own stands here, before what follows.", prose(1, 700).strip()
    documents = [Document("a", borrowed), Document("b", f"{own} {borrowed} {own[:-1]} and ends."), Document("c", f"{borrowed} And so on.")]
    reasons = select("substring", documents, substring.Config(min_characters=60))
    assert reasons[:2] == ["", ""] and documents[1].text == f"{own}\n{own[:-1]} and ends."
    assert reasons[2].startswith("nothing but passages seen before: 10 of") and documents[2].text.startswith(borrowed)
    with pytest.raises(ConfigError, match="words: 5 would cut"):
        substring.check(substring.Config(words=5))


def test_hashes_do_not_depend_on_where_a_word_stands():
    found = Words(["alpha beta alpha", "beta", "a" * 300 + " alpha"])
    hashes = found.hashes.tolist()
    assert hashes[0] == hashes[2] == hashes[5] and hashes[1] == hashes[3] and len(set(hashes)) == 3
    assert found.has_letter.all() and np.array_equal(found.lengths, [5, 4, 5, 4, 300, 5])
