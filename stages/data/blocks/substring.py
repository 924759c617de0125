"""Passages that occur again, in any document: from `words` words in a row on, all but the first go, the rest stays.

What Lee et al. (arXiv 2107.06499) do with a suffix array over bytes and 50 tokens, at the grain of words: every run of
`words` words is hashed (64 bits, 16 bytes of disk a word, where their array takes 8 a byte), equal hashes meet over the
whole corpus, and the union of the runs found again is cut out. So a passage is found wherever it begins and cut to its
last word. The differences: case, punctuation and white space do not matter; code and names are left alone, they would no longer parse;
two runs are taken for equal by their hash. That errs n^2 / 2^65 times among n words: once in 40 corpora of 10^9 words (6 GB),
800 times in a terabyte, where the 40,000 words cut in error are 2 in 10^7, fewer than mojibake leaves. A document of which
little is left is kept whole among the removed.
"""

import re
from dataclasses import dataclass

import numpy as np

from stages.data.document import Document
from stages.data.join import Keys, State, in_order
from stages.data.thresholds import at_least
from stages.data.words import groups, ngrams, windows, word_bounds
from stages.stage import ConfigError, option

ROW = [("document", np.int64), ("hash", np.uint64)]
LEFT_ALONE = ("code", "names")
MARKS = re.compile(r"[^\w\s]*")  # which end a passage


@dataclass
class Config:
    words: int = option(50, "shortest passage, in words (characters in Chinese, Japanese, Thai)")
    min_characters: int = at_least(200, "a document of which less is left goes too")


def check(config: Config) -> None:
    """Raises ConfigError for passages so short that language is made of them."""
    if config.words < 10:
        raise ConfigError(f"options.substring.words: {config.words} would cut common phrases out of sentences; give 10 or more")


def keys(documents: list[Document], config: Config) -> np.ndarray:
    """A row a run of words."""
    prose = [i for i, document in enumerate(documents) if document.domain not in LEFT_ALONE]
    parts = [np.empty(0, ROW)]
    for hashes, text in ngrams([documents[i].text for i in prose], config.words):
        rows = np.empty(len(hashes), ROW)
        rows["document"], rows["hash"] = np.array(prose, np.int64)[text], hashes
        parts.append(rows)
    return np.concatenate(parts)


def join(keys: Keys, config: Config, state: State) -> None:
    """`hashes` of the runs that occur twice or more, in order, and `first`, the document of each one's first."""
    path = state.folder / "found"
    with open(path, "wb") as file:
        for rows in in_order(keys, state.folder):
            begins = np.flatnonzero(np.concatenate([[True], rows["hash"][1:] != rows["hash"][:-1]])) if len(rows) else []
            counts = np.diff(np.append(begins, len(rows)))
            file.write(rows[np.asarray(begins, np.int64)[counts > 1]].tobytes())
    found = np.fromfile(path, ROW)
    state.array("hashes", np.uint64, len(found))[:] = found["hash"]
    state.array("first", np.int64, len(found))[:] = found["document"]
    state.index("hashes")
    path.unlink()


def apply(documents: list[Document], places: np.ndarray, config: Config, state: State) -> list[str]:
    """Cuts the passages in place; a reason to remove a document of which too little is left."""
    reasons = [""] * len(documents)
    prose = [i for i, document in enumerate(documents)
             if document.domain not in LEFT_ALONE and document.split not in ("benchmark", "existing")]  # fmt: skip
    for group in groups([documents[i].text for i in prose]):
        chosen = [prose[i] for i in group]
        hashes, starts, ends, lengths = word_bounds([documents[i].text for i in chosen])
        offsets = np.cumsum([0, *(len(documents[i].text) + 1 for i in chosen)])
        runs = list(windows(hashes, lengths, config.words))
        found = np.concatenate([part for part, _ in runs] or [np.empty(0, np.uint64)])
        text = np.concatenate([part for _, part in runs] or [np.empty(0, np.int64)])
        again = _again(found, text, places[chosen], state)
        first_word = np.concatenate([[0], np.cumsum(lengths)])
        first_run = np.searchsorted(text, np.arange(len(chosen) + 1))
        for j in np.unique(text[again]).tolist():
            at = np.flatnonzero(again[first_run[j] : first_run[j + 1]]) + first_word[j]
            reasons[chosen[j]] = _cut(documents[chosen[j]], starts[at] - offsets[j], ends[at + config.words - 1] - offsets[j], config)
    return reasons


def _again(hashes: np.ndarray, text: np.ndarray, places: np.ndarray, state: State) -> np.ndarray:
    """bool [runs]: those that occurred before, in another document or in their own."""
    place = state.find("hashes", hashes)
    known = np.flatnonzero(place >= 0)
    again = np.zeros(len(hashes), bool)
    again[known] = state["first"][place[known]] != places[text[known]]
    _, earliest = np.unique(np.stack([text[known], place[known]]), axis=1, return_index=True)
    later = np.ones(len(known), bool)
    later[earliest] = False
    again[known[later]] = True
    return again


def _cut(document: Document, starts: np.ndarray, ends: np.ndarray, config: Config) -> str:
    """Cuts the union of [start, end) (ascending) out of the text; a reason where too little is left."""
    whole, kept, place = document.text, [], 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if start > place:
            kept.append(whole[place:start].strip())
        place = max(place, MARKS.match(whole, end).end())
    kept.append(whole[place:].strip())
    document.text = "\n".join(part for part in kept if part)
    if len(document.text) >= config.min_characters:
        return ""
    document.text, left = whole, len(document.text)
    return f"nothing but passages seen before: {left} of {len(whole)} characters are left"
