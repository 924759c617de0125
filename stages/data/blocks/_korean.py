"""Korean UTF-8 that was read as Thai (cp874, what it lacks as cp1252) and saved so: undone, with the bytes that were lost.

The five bytes that neither code page has were dropped on the way, about every fourth syllable lacks one. Every syllable
that the bytes left allow is weighed by how often Korean has it and by its neighbours elsewhere in the text.
"""

from __future__ import annotations

from collections import Counter

LOST = bytes.fromhex("818d8f909d")  # defined in neither code page
# Syllables of Korean prose by rough frequency, most frequent first.
FREQUENT = (
    "이다는에의을가고하지로은기사도한리를시인어자서나대정아있스그수일들라보해주전상부제여만원경장구게과등면으년우안성조문공국동소신미무내유비마세위오"
    "건통당선방생화재모중계분학용관연발회적실진체결심행단물명간반역입민교설식작외품음말업러된출영금본요질권데양최북치감약개열트술파월니노속법저바타"
    "터토크프포드디르네레려야와요까없많같것않습때때문존엄등평형제론언론교육"
)
RANK = {syllable: 1 / (i + 10) for i, syllable in reversed(list(enumerate(FREQUENT)))}
LEAD = range(0xEA, 0xEE)  # first bytes of syllables
MIN_SHARE = 0.8  # of the bytes above ASCII that must make syllables


def repair(text: str) -> str | None:
    """The Korean text, or None where this is something else. What stays open is U+FFFD."""
    if not any(mark in text for mark in "๊๋์ํ"):  # the first bytes of syllables, in Thai
        return None
    data = _bytes(text)
    if data is None:
        return None
    pieces = list(_pieces(data))
    high = sum(len(piece) for piece in pieces if piece[0] >= 0x80)
    korean = sum(len(piece) for piece in pieces if piece[0] in LEAD and len(piece) > 1)
    if korean < MIN_SHARE * high:
        return None
    choices = [_choices(piece) for piece in pieces]
    sure = "".join(choice[0] if len(choice) == 1 else "\0" for choice in choices)
    pairs, single = Counter(zip(sure, sure[1:], strict=False)), Counter(sure)
    found: list[str] = []
    for i, choice in enumerate(choices):
        before = found[-1] if found else "\n"
        after = sure[i + 1 : i + 2] or "\n"

        def weight(one: str, before: str = before, after: str = after) -> float:
            return (RANK.get(one, 1e-5) + single[one] / (len(sure) + 50)) * (1 + 20 * pairs[before, one] + 20 * pairs[one, after])

        found.append(max(choice, key=weight))
    return "".join(found)


def _bytes(text: str) -> bytes | None:
    """The text's bytes before it was read as Thai; None if it holds a character of neither code page."""
    found = bytearray()
    for character in text:
        for page in ("cp874", "cp1252"):
            try:
                found += character.encode(page)
                break
            except UnicodeEncodeError:
                continue
        else:
            return None
    return bytes(found)


def _pieces(data: bytes):
    """Characters of UTF-8, with those that lack bytes."""
    i = 0
    while i < len(data):
        first = data[i]
        size = 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
        end = i + 1
        while end < min(i + size, len(data)) and 0x80 <= data[end] < 0xC0:
            end += 1
        yield data[i:end]
        i = end


def _choices(piece: bytes) -> list[str]:
    """What a piece can have been: itself, or syllables that lack a byte or two."""
    try:
        return [piece.decode()]
    except UnicodeDecodeError:
        pass
    if piece == b"\xe2\x80":
        return ["”"]
    if piece[0] not in LEAD or len(piece) == 1:
        return ["\ufffd"]
    first, second = piece[:1], piece[1:]
    tried = [first + second + bytes([lost]) for lost in LOST] + [first + bytes([lost]) + second for lost in LOST]
    found = []
    for one in tried:
        try:
            found += [character for character in one.decode() if "가" <= character <= "힣"]
        except UnicodeDecodeError:
            continue
    return found or ["\ufffd"]
