"""Instructions whose following a program can check: the 25 types of IFEval (Zhou et al., arXiv 2311.07911) in 9 groups.

Names, arguments, conditions and the table of conflicts are the paper's published ones, so that its own data can be judged:
`check.constraints` is a list of [name, arguments]. Sentences and words are counted without NLTK, languages identified by
py3langid in place of langdetect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

SURE = 20  # letters from which a language can be told; a Chinese, Japanese or Korean character counts three

_RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "less than": lambda found, limit: found < limit,
    "at least": lambda found, limit: found >= limit,
}


def language_of(text: str) -> str:
    """The text's language as an ISO 639-1 code, "" where there is too little of it to tell."""
    import py3langid

    letters = sum(3 if "\u3040" <= c <= "\ud7af" else 1 for c in text if c.isalpha())
    return py3langid.classify(" ".join(text.split()))[0] if letters >= SURE else ""


def sentences(text: str) -> int:
    return len([part for part in re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip()) if re.search(r"\w", part)])


def words(text: str) -> int:
    return len(re.findall(r"\w+", text))


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    inner = parts[1:-1] if len(parts) > 1 else parts
    return all(inner) and sum(map(bool, parts)) == num_paragraphs


def _nth_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = text.split("\n\n")
    if sum(bool(part.strip()) for part in parts) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    opening = (parts[nth_paragraph - 1].split() or [""])[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", opening)[0].lower() == first_word.lower()


def _highlights(text: str, num_highlights: int) -> bool:
    single = [h for h in re.findall(r"\*[^\n*]*\*", text) if h.strip("*").strip()]
    double = [h for h in re.findall(r"\*\*[^\n*]*\*\*", text) if h[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def _postscript(text: str, postscript_marker: str) -> bool:
    own = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(own, text.lower()) is not None


def _json(text: str) -> bool:
    text = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```").strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _two(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _RELATIONS[let_relation](text.lower().count(letter.lower()), let_frequency)


def _keyword(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _RELATIONS[relation](len(re.findall(re.escape(keyword), text, re.IGNORECASE)), frequency)


def _capitals(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _RELATIONS[capital_relation](sum(word.isupper() for word in re.findall(r"\w+", text)), capital_frequency)


def _english(text: str) -> bool:
    return language_of(text.lower()) in ("en", "")  # as published: where nothing can be told, it counts as followed


# Name -> what a prompt says, and whether a response follows it.
TYPES: dict[str, tuple[str, Callable[..., bool]]] = {
    "keywords:existence": (
        "Include keywords {keywords} in the response.",
        lambda t, keywords: all(k.lower() in t.lower() for k in keywords),
    ),
    "keywords:frequency": ("In your response, the word {keyword} should appear {relation} {frequency} times.", _keyword),
    "keywords:forbidden_words": (
        "Do not include keywords {forbidden_words} in the response.",
        lambda t, forbidden_words: not any(re.search(rf"\b{re.escape(w)}\b", t, re.IGNORECASE) for w in forbidden_words),
    ),
    "keywords:letter_frequency": (
        "In your response, the letter {letter} should appear {let_relation} {let_frequency} times.", _letters,
    ),
    "language:response_language": (
        "Your ENTIRE response should be in {language} language, no other language is allowed.",
        lambda t, language: language_of(t.lower()) == language,
    ),
    "length_constraints:number_sentences": (
        "Your response should contain {relation} {num_sentences} sentences.",
        lambda t, num_sentences, relation: _RELATIONS[relation](sentences(t), num_sentences),
    ),
    "length_constraints:number_paragraphs": (
        "There should be {num_paragraphs} paragraphs. Paragraphs are separated with the markdown divider: ***", _paragraphs,
    ),
    "length_constraints:number_words": (
        "Answer with {relation} {num_words} words.",
        lambda t, num_words, relation: _RELATIONS[relation](words(t), num_words),
    ),
    "length_constraints:nth_paragraph_first_word": (
        "There should be {num_paragraphs} paragraphs. Paragraphs and only paragraphs are separated with each other by two new "
        "lines. Paragraph {nth_paragraph} must start with word {first_word}.", _nth_first_word,
    ),
    "detectable_content:number_placeholders": (
        "The response must contain at least {num_placeholders} placeholders represented by square brackets, such as [address].",
        lambda t, num_placeholders: len(re.findall(r"\[.*?\]", t)) >= num_placeholders,
    ),
    "detectable_content:postscript": (
        "At the end of your response, please explicitly add a postscript starting with {postscript_marker}", _postscript,
    ),
    "detectable_format:number_bullet_lists": (
        "Your answer must contain exactly {num_bullets} bullet points. Use the markdown bullet points such as: * This is a point.",
        lambda t, num_bullets: len(re.findall(r"^\s*(?:\*[^*].*|-.*)$", t, re.MULTILINE)) == num_bullets,
    ),
    "detectable_format:constrained_response": (
        "Answer with one of the following options: 'My answer is yes.', 'My answer is no.', 'My answer is maybe.'",
        lambda t: re.search(r"My answer is (?:yes|no|maybe)\.", t) is not None,
    ),
    "detectable_format:number_highlighted_sections": (
        "Highlight at least {num_highlights} sections in your answer with markdown, i.e. *highlighted section*.", _highlights,
    ),
    "detectable_format:multiple_sections": (
        "Your response must have {num_sections} sections. Mark the beginning of each section with {section_spliter} X, such as: "
        "{section_spliter} 1",
        lambda t, section_spliter, num_sections: len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", t)) >= num_sections,
    ),
    "detectable_format:json_format": (
        "Entire output should be wrapped in JSON format. You can use markdown ticks such as ```.", _json,
    ),
    "detectable_format:title": (
        "Your answer must contain a title, wrapped in double angular brackets, such as <<poem of joy>>.",
        lambda t: any(title.strip("<> ") for title in re.findall(r"<<[^\n]+>>", t)),
    ),
    "combination:two_responses": (
        "Give two different responses. Responses and only responses should be separated by 6 asterisk symbols: ******.", _two,
    ),
    "combination:repeat_prompt": (
        "First repeat the request word for word without change, then give your answer (do not say any words before repeating the "
        "request; the request you need to repeat does not include this sentence)",
        lambda t, prompt_to_repeat: t.strip().lower().startswith(prompt_to_repeat.strip().lower()),
    ),
    "startend:end_checker": (
        "Finish your response with this exact phrase {end_phrase} No other words should follow this phrase.",
        lambda t, end_phrase: t.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    ),
    "startend:quotation": (
        "Wrap your entire response with double quotation marks.",
        lambda t: len(t.strip()) > 1 and t.strip()[0] == t.strip()[-1] == '"',
    ),
    "change_case:capital_word_frequency": (
        "In your response, words with all capital letters should appear {capital_relation} {capital_frequency} times.", _capitals,
    ),
    "change_case:english_capital": (
        "Your entire response should be in English, and in all capital letters.", lambda t: t.isupper() and _english(t),
    ),
    "change_case:english_lowercase": (
        "Your entire response should be in English, and in all lowercase letters. No capital letters are allowed.",
        lambda t: t.islower() and _english(t),
    ),
    "punctuation:no_comma": ("In your entire response, refrain from the use of any commas.", lambda t: "," not in t),
}  # fmt: skip


def _conflicts() -> dict[str, set[str]]:
    """Each type's conflicts, itself included: the published table, made symmetric."""
    every, table = set(TYPES), {name: {name} for name in TYPES}
    keywords = {"keywords:existence", "keywords:frequency", "keywords:forbidden_words"}
    table["language:response_language"] |= {
        *keywords, "detectable_format:multiple_sections", "startend:end_checker", "change_case:english_capital",
        "change_case:english_lowercase",
    }  # fmt: skip
    table["length_constraints:number_paragraphs"] |= {
        "length_constraints:nth_paragraph_first_word", "length_constraints:number_sentences",
    }  # fmt: skip
    table["detectable_format:constrained_response"] |= every
    table["detectable_format:multiple_sections"] |= {"detectable_format:number_highlighted_sections"}
    table["detectable_format:json_format"] |= every - {"keywords:forbidden_words", "keywords:existence"}
    free = {"keywords:existence", "detectable_format:title", "punctuation:no_comma"}
    table["combination:repeat_prompt"] |= every - free
    table["combination:two_responses"] |= every - free - {"keywords:forbidden_words", "language:response_language"}
    table["change_case:capital_word_frequency"] |= {"change_case:english_lowercase", "change_case:english_capital"}
    table["change_case:english_lowercase"] |= {"change_case:english_capital"}
    table["startend:quotation"] |= {"detectable_format:title"}
    for name, others in table.items():
        for other in others:
            table[other].add(name)
    return table


CONFLICTS = _conflicts()


def ask(name: str, arguments: dict[str, Any]) -> str:
    """The instruction as a prompt says it."""
    return TYPES[name][0].format(**arguments)


def followed(constraints: list, text: str, loose: bool = False) -> list[bool]:
    """Whether the text follows each [name, arguments]. loose: the paper's second measure, where it may be without its first
    line, its last, both, and without asterisks. Raises KeyError for a type that is not known."""
    texts = [text]
    if loose:
        lines = text.split("\n")
        texts = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
        texts += [one.replace("*", "") for one in texts]
    return [
        any(
            bool(one.strip()) and TYPES[name][1](one, **{k: v for k, v in (given or {}).items() if v is not None})
            for one in texts
        )
        for name, given in constraints
    ]
