"""Units of text and their n-gram hashes, for every script."""

from __future__ import annotations

import re
import unicodedata
from hashlib import blake2b

import numpy as np

# Scripts written without spaces: Thai and Lao, Myanmar, Khmer, kana, Han. There, a character is a unit.
UNSPACED_RANGES = [(0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x4DBF),
                   (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)]  # fmt: skip
UNSPACED = "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED_RANGES)
SPACELESS = re.compile(f"[{UNSPACED}]")
UNIT = re.compile(f"[{UNSPACED}]|[^\\s!-/:-@\\[-`{{-~\u2000-\u206f\u3000-\u303f\uff00-\uff0f{UNSPACED}]+")
MULTIPLIER = np.uint64(0x100000001B3)  # FNV's prime


def units(text: str) -> list[str]:
    """Words between spaces and punctuation, and single characters of scripts that put no spaces."""
    return UNIT.findall(text)


def normalised(text: str) -> str:
    """The text with case, compatibility forms and white space evened out: equal for equal documents."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).lower().split())


def hash64(text: str) -> int:
    """64 bits of the text's BLAKE2b, the same on every machine."""
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())


def mixed(hashes: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: the low bits of a polynomial hash depend on low bits alone."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ (hashes >> np.uint64(31))


def rolling(values: np.ndarray, n: int) -> np.ndarray:
    """Hashes uint64 [T-n+1] of all windows of n values (uint64 [T]); empty where T < n."""
    count = max(len(values) - n + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for i in range(n if count else 0):
        hashes *= MULTIPLIER
        hashes += values[i : i + count]
    return mixed(hashes)
