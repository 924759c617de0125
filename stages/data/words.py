"""A batch of texts as arrays: the words of all of them at once, with lengths, hashes and what they are made of.

Words are cut as spaCy's rules cut English: at spaces, around punctuation (each mark is a word of its own), before the
apostrophe of `don't`; not inside 3.5, e.g, snake_case or example.com. A character of a script without spaces is a word.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache, cached_property

import numpy as np

from stages.data.text import MULTIPLIER, UNSPACED_RANGES, mixed

SPACE, MARK, OTHER, LETTER, UNSPACED = range(5)  # kinds of characters
# What is no word by itself: datatrove's list (datatrove/utils/text.py, 0.10.1) without its control characters.
MARKS = "!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»।॥؟۔።"
_RUNS, _BEFORE = np.zeros(128, bool), np.zeros(128, bool)
_RUNS[[ord(mark) for mark in ".-~'"]] = _BEFORE[[ord(mark) for mark in "-/~@\\|.^"]] = True
BLOCK = 1 << 20  # most characters of a text
GROUP = 1 << 17  # characters looked at together: their arrays stay in the second-level cache


@cache
def kinds() -> np.ndarray:
    """uint8 [0x110000]: the kind of each character."""
    table = np.full(0x110000, OTHER, np.uint8)
    for code in range(0x32000):
        character = chr(code)
        if character.isalpha():
            table[code] = LETTER
        elif character.isspace() or code < 32 or unicodedata.category(character) in ("Cc", "Zs"):
            table[code] = SPACE
    table[[ord(mark) for mark in MARKS]] = MARK
    for first, last in UNSPACED_RANGES:
        table[first : last + 1] = UNSPACED
    return table


@cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """MULTIPLIER^i and its inverse mod 2^64, uint64 [BLOCK + 1]."""
    inverse = np.uint64(pow(int(MULTIPLIER), -1, 2**64))
    found = []
    for base in (MULTIPLIER, inverse):
        factors = np.full(BLOCK + 4, base, np.uint64)
        factors[0] = 1
        found.append(np.multiply.accumulate(factors))
    return found[0], found[1]


def prefix_sums(values: np.ndarray) -> np.ndarray:
    """uint64 [T+1]: sums of values[i] * MULTIPLIER^i mod 2^64, for `spans`; T at most BLOCK."""
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * _powers()[0][: len(values)], out=sums[1:])
    return sums


def spans(sums: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Hashes uint64 of values[start:end]: the same wherever they stand."""
    return (sums[ends] - sums[starts]) * _powers()[1][starts]


class Words:
    """Words of texts, at most BLOCK characters together.

    starts, ends: int64 [words], in `codes` (uint32, all texts joined). first: int64 [texts + 1], each text's first word.
    lengths: int32 [words], in characters. text_lengths: int64 [texts].
    """

    def __init__(self, texts: list[str]):
        self.text_lengths = np.array([len(text) for text in texts], np.int64)
        self.codes = np.frombuffer("\n".join(["", *texts, ""]).encode("utf-32-le"), np.uint32)
        self.kinds = kinds()[self.codes]
        self.text_starts = 1 + np.concatenate([[0], np.cumsum(self.text_lengths + 1)])
        begins = self._begins()
        bounds = np.flatnonzero(begins | (self.kinds == SPACE) & np.concatenate([[False], self.kinds[:-1] != SPACE]))
        is_start = begins[bounds]
        self.starts = bounds[is_start]
        self.ends = np.append(bounds, len(self.codes))[1:][is_start]
        self.lengths = (self.ends - self.starts).astype(np.int32)
        self.first = np.searchsorted(self.starts, self.text_starts)

    def _begins(self) -> np.ndarray:
        """bool [characters]: where a word begins."""
        codes, kind = self.codes, self.kinds
        solid = (kind == OTHER) | (kind == LETTER)
        marks = np.flatnonzero(kind == MARK)  # never the first or the last: those are line ends
        joined = np.zeros(len(codes), bool)
        joined[self._inside(marks, solid)] = True
        word = solid | joined
        begins = word | (kind == MARK) | (kind == UNSPACED)
        begins[1:] &= ~(word[1:] & word[:-1])
        # Dashes, dots and quotes in a row are one word, and so is the emoticon that ends a definition in Python.
        run = marks[(codes[marks] == codes[marks - 1]) & _RUNS[codes[marks] & 127] & (codes[marks] < 128) & ~joined[marks]]
        begins[run] = False
        begins[marks[(codes[marks] == ord(":")) & (codes[marks - 1] == ord(")")) & (kind[marks + 1] == SPACE)]] = False
        # -1, /path, @name, .5: a mark before a word and after a space belongs to it.
        before = marks[_BEFORE[codes[marks] & 127] & (codes[marks] < 128) & (kind[marks - 1] == SPACE) & solid[marks + 1]]
        begins[before + 1] = False
        apostrophe = marks[joined[marks] & ((codes[marks] == ord("'")) | (codes[marks] == ord("’")))]
        begins[apostrophe] = True
        return begins

    def _inside(self, marks: np.ndarray, solid: np.ndarray) -> np.ndarray:
        """The marks that do not part a word: within it, and none that spaCy's infix rules split at."""
        codes, letter = self.codes, self.kinds == LETTER
        at = marks[solid[marks - 1] & solid[marks + 1]]
        mark, left, right = codes[at], letter[at - 1], letter[at + 1]
        split = np.isin(mark, _codes("-–—:<>=/")) & right | (mark == ord(",")) & left & right
        split |= np.isin(mark, _codes("-+*^")) & ~left & ~right
        capital = (codes[at + 1] >= ord("A")) & (codes[at + 1] <= ord("Z"))
        split |= (mark == ord(".")) & (codes[at - 1] >= ord("a")) & (codes[at - 1] <= ord("z")) & capital
        dot = marks[(codes[marks] == ord(".")) & letter[marks - 1] & (codes[marks - 2] == ord(".")) & ~solid[marks + 1]]
        return np.concatenate([at[~split], dot, self._runs(marks, solid), self._addresses(marks)])

    def _runs(self, marks: np.ndarray, solid: np.ndarray) -> np.ndarray:
        """Marks that follow one another within a word, unless dots or dashes do."""
        if not len(marks):
            return marks
        ends = np.append(np.diff(marks) > 1, True)
        last = np.flatnonzero(ends)
        first = np.concatenate([[0], last[:-1] + 1])
        whole = (last > first) & solid[marks[first] - 1] & solid[marks[last] + 1]
        twice = (self.codes[marks] == self.codes[marks - 1]) & np.isin(self.codes[marks], _codes("-."))
        whole &= np.add.reduceat(twice, first) == 0
        return marks[np.repeat(whole, last - first + 1)]

    def _addresses(self, marks: np.ndarray) -> np.ndarray:
        """Marks within web addresses, up to the last character that is no mark."""
        colon = marks[(self.codes[marks] == ord(":")) & (self.codes[marks + 1] == ord("/"))]
        colon = colon[self.kinds[colon - 1] == LETTER]
        letters = self.kinds == LETTER
        scheme = np.flatnonzero(letters[1:] > letters[:-1])
        scheme = scheme[np.searchsorted(scheme, colon) - 1] if len(scheme) else np.zeros(len(colon), np.int64)  # one before
        colon = colon[(self.kinds[scheme] == SPACE) | (self.kinds[np.maximum(scheme - 1, 0)] == SPACE)]
        if not len(colon):
            return colon
        spaces, others = np.flatnonzero(self.kinds == SPACE), np.flatnonzero(self.kinds > MARK)
        stop = np.append(spaces, len(self.codes))[np.searchsorted(spaces, colon)]
        stop = others[np.searchsorted(others, stop) - 1]
        inside = np.searchsorted(stop, marks)  # of the first address that ends behind the mark
        begun = colon[np.minimum(inside, len(colon) - 1)] <= marks
        return marks[begun & (inside < len(stop))]

    @cached_property
    def is_word(self) -> np.ndarray:
        """bool [words]: more than a punctuation mark."""
        return (self.kinds[self.starts] != MARK) | (self.lengths > 1) & (self.codes[self.starts] != ord("."))

    @cached_property
    def has_letter(self) -> np.ndarray:
        """bool [words]."""
        found = (self.kinds[self.starts] >= LETTER) | (self.kinds[self.ends - 1] >= LETTER)
        unsure = np.flatnonzero(~found & (self.lengths > 2))
        letters = np.concatenate([[0], np.cumsum(self.kinds >= LETTER, dtype=np.int32)])
        found[unsure] = letters[self.ends[unsure]] > letters[self.starts[unsure]]
        return found

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint64 [words]: equal for equal words."""
        return mixed(spans(prefix_sums(self.codes.astype(np.uint64)), self.starts, self.ends))

    @cached_property
    def sums(self) -> np.ndarray:
        """uint64 [words + 1]: for `spans` of words."""
        return prefix_sums(self.hashes)

    @cached_property
    def length_sums(self) -> np.ndarray:
        """int64 [words + 1]: characters of the words before each."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def count(self, where: np.ndarray) -> np.ndarray:
        """int64 [texts]: the sum over each text's words of a value a word."""
        total = np.concatenate([[0], np.cumsum(where, dtype=np.int64)])
        return total[self.first[1:]] - total[self.first[:-1]]


_recent: dict[int, tuple[str, Words, int]] = {}  # of the last batch: filters that follow one another cut it once


def cut(texts: list[str]) -> Iterator[tuple[Words, np.ndarray, list[int]]]:
    """The texts in groups, as (words, which of their texts, which of `texts`). Those longer than BLOCK are left out."""
    if not all(_recent.get(id(text), ("",))[0] is text for text in texts if len(text) <= BLOCK):
        _recent.clear()
        short = [text for text in texts if len(text) <= BLOCK]
        for group in groups(short):
            words = Words([short[i] for i in group])
            _recent.update((id(short[i]), (short[i], words, row)) for row, i in enumerate(group))
    found: dict[int, tuple[Words, list[int], list[int]]] = {}
    for i, text in enumerate(texts):
        if len(text) <= BLOCK:
            _, words, row = _recent[id(text)]
            one = found.setdefault(id(words), (words, [], []))
            one[1].append(row)
            one[2].append(i)
    yield from ((words, np.array(rows), places) for words, rows, places in found.values())


def groups(texts: list[str]) -> Iterator[list[int]]:
    """The texts by number, in groups of about GROUP characters; a longer text stands alone."""
    group, room = [], GROUP
    for i, text in enumerate(texts):
        if group and len(text) + 1 > room:
            yield group
            group, room = [], GROUP
        group.append(i)
        room -= len(text) + 1
    if group:
        yield group


@cache
def normal(fold_digits: bool = False) -> np.ndarray:
    """uint32 [0x110000]: each character without what makes no difference: case, which mark or space; if asked, which digit."""
    table = np.arange(0x110000, dtype=np.uint32)
    kind = kinds()
    for code in np.flatnonzero(kind[:0x32000] == LETTER).tolist():
        lower = chr(code).lower()
        table[code] = ord(lower) if len(lower) == 1 else code
    if fold_digits:
        table[[code for code in np.flatnonzero(kind[:0x32000] == OTHER).tolist() if chr(code).isdigit()]] = ord("0")
    table[(kind == SPACE) | (kind == MARK)] = ord(" ")
    return table


def normal_codes(texts: list[str], fold_digits: bool) -> tuple[np.ndarray, np.ndarray]:
    """The normal characters of all texts (uint32), runs of spaces (and of folded digits) as one; how many in each (int64)."""
    lengths = np.array([len(text) for text in texts], np.int64)
    codes = normal(fold_digits)[np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)]
    stays = codes != ord(" ")
    if fold_digits:
        stays &= codes != ord("0")
    stays[1:] |= codes[1:] != codes[:-1]
    stays[(np.cumsum(lengths) - lengths)[lengths > 0]] = True  # no run goes over from one text to the next
    count = np.concatenate([[0], np.cumsum(stays)])[np.concatenate([[0], np.cumsum(lengths)])]
    return codes[stays], np.diff(count)


def windows(values: np.ndarray, lengths: np.ndarray, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(hashes uint64, text int64) of all windows of n values (uint32 or uint64) within the texts, in parts.

    A text shorter than n has none.
    """
    ends = np.cumsum(lengths)
    inverse, owner = _powers()[1], np.repeat(np.arange(len(lengths)), lengths)
    for start in range(0, len(values), GROUP):
        part = values[start : start + GROUP + n - 1].astype(np.uint64)
        count = len(part) - n + 1
        if count > 0:
            sums, text = prefix_sums(part), owner[start : start + count]
            hashes = (sums[n:] - sums[:-n]) * inverse[:count]
            inside = np.arange(start + n, start + n + count) <= ends[text]
            yield hashes[inside], text[inside]


def ngrams(texts: list[str], n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(hashes uint64, text int64) of n-grams of words, whatever marks and spaces lie between, in parts.

    In scripts without spaces, of characters. A text of fewer words has none.
    """
    for group in groups(texts):
        hashes, _, _, lengths = word_bounds([texts[i] for i in group])
        for found, text in windows(hashes, lengths, n):
            yield found, np.array(group)[text]


def word_bounds(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(hashes uint64, starts, ends int64 [words], words of each text int64): words without the marks between them.

    Places are characters of all texts joined by one character.
    """
    codes = normal()[np.frombuffer("\n".join(texts).encode("utf-32-le"), np.uint32)]
    kind = kinds()[codes]
    bare = (kind == UNSPACED) | (codes == ord(" ")) | (codes == ord("\n"))
    begins = ~bare
    begins[1:] &= bare[:-1]
    begins |= kind == UNSPACED
    starts = np.flatnonzero(begins)
    ends = np.flatnonzero(~bare & np.append(bare[1:], True) | (kind == UNSPACED)) + 1
    hashes = np.concatenate([mixed(spans(prefix_sums(part.astype(np.uint64)), here - offset, there - offset))
                             for part, offset, here, there in _parts(codes, starts, ends)] or [np.empty(0, np.uint64)])
    stops = np.cumsum([len(text) + 1 for text in texts])
    return hashes, starts, ends, np.diff(np.searchsorted(starts, np.concatenate([[0], stops])))


def _parts(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Iterator[tuple[np.ndarray, int, np.ndarray, np.ndarray]]:
    """The words in parts of about GROUP characters: (characters, where they lie, starts, ends)."""
    first = 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + GROUP)))
        offset = int(starts[first])
        part = codes[offset : min(int(ends[last - 1]), offset + BLOCK)]
        yield part, offset, starts[first:last], np.minimum(ends[first:last], offset + BLOCK)
        first = last


@cache
def _codes(characters: str) -> np.ndarray:
    return np.array([ord(character) for character in characters], np.uint32)
