"""Requests with instructions that a program can check: IFEval's 25 types, combined where they do not conflict.

Reward: 1 when all instructions are followed by a text that is on the topic asked for, half the share of them otherwise, 0 for
none, for a text off the topic and for one that copies the whole prompt.

Your own prompts: `check` is {"constraints": [[name, arguments], ...], "about": word that must occur, "" for any}, as IFEval's
`instruction_id_list` and `kwargs` side by side.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from stages.stage import option
from stages.tasks import _constraints
from stages.tasks._common import language_names, prompt


@dataclass
class Options:
    types: list[str] = option(
        sorted(_constraints.TYPES),
        "instruction types, by their published names",
        choices=tuple(sorted(_constraints.TYPES)),
    )
    constraints: int = option(3, "most instructions a prompt; each has 1 to this many")
    sentences: int = option(4, "most sentences that an answer begins from; what is asked for may add to them")


TOPICS = "bridges gardens trains clouds whales poems songs kites wolves harbours rivers bees castles markets lamps boats".split()
REQUESTS = (
    "Write about {t}.",
    "Tell me about {t}.",
    "Say something on the topic of {t}.",
    "I want to read about {t}.",
    "Describe {t}.",
)
SAYINGS = (
    "Many people like {t}.", "One can learn a lot about {t}.", "There are old books on {t}.", "My uncle often talks of {t}.",
    "In our town there is a small museum of {t}.", "Children ask good questions about {t}.", "It takes years to know all about {t}.",
    "A friend of mine once made a film about {t}.", "Some say that {t} were never as popular as now.",
    "Few things are as pleasant as {t} on a Sunday.", "The history of {t} is long, and it is not over yet.",
    "Painters, poets and cooks have praised {t}.",
)  # fmt: skip
KEYWORDS = (
    "window letter morning honest copper ladder silver market gentle harbour pocket orange simple engine forest".split()
)
PLACEHOLDERS = "[name] [address] [date] [place] [number] [price]".split()
ENDINGS = ("Any other questions?", "Is there anything else I can help with?")
# Short texts for the instruction on the language, in the languages' own words.
SPEECH = {
    "de": ("Das ist eine schöne Sache, über die man viel erzählen kann.", "Viele Menschen freuen sich jeden Tag darüber."),
    "fr": ("C'est une belle chose dont on peut parler longtemps.", "Beaucoup de gens s'en réjouissent chaque jour."),
    "es": ("Es una cosa hermosa de la que se puede hablar mucho.", "Muchas personas se alegran de ello todos los días."),
    "it": ("È una cosa bella di cui si può parlare a lungo.", "Molte persone ne sono contente ogni giorno."),
    "pt": ("É uma coisa bonita sobre a qual se pode falar muito.", "Muitas pessoas ficam felizes com isso todos os dias."),
    "nl": ("Het is een mooi onderwerp waarover je veel kunt vertellen.", "Veel mensen worden er elke dag blij van."),
    "pl": ("To piękna rzecz, o której można długo opowiadać.", "Wielu ludzi cieszy się tym każdego dnia."),
    "ru": ("Это прекрасная вещь, о которой можно долго рассказывать.", "Многие люди радуются этому каждый день."),
    "tr": ("Bu, hakkında uzun uzun konuşulabilecek güzel bir şeydir.", "Birçok insan her gün buna seviniyor."),
    "el": ("Είναι ένα όμορφο θέμα για το οποίο μπορεί να μιλήσει κανείς πολύ.", "Πολλοί άνθρωποι χαίρονται κάθε μέρα."),
}  # fmt: skip


def check(options: Options) -> str:
    """What is wrong with the options, "" if nothing."""
    if not options.types or options.constraints < 1 or options.sentences < 1:
        return "a request needs one of the types, constraints of at least 1 and sentences of at least 1"
    return ""


def generate(rng: random.Random, count: int, documents: list[dict], options: Options) -> list[dict]:
    """`count` requests; `documents` are not used."""
    return [_request(rng, options) for _ in range(count)]


def _request(rng: random.Random, options: Options) -> dict:
    """Draws until the answer follows what was drawn: the published table leaves in a few pairs that no text can follow together, such as
    lower case and "Section 1"."""
    while True:
        topic = rng.choice(TOPICS)
        request = rng.choice(REQUESTS).format(t=topic)
        names: list[str] = []
        for name in rng.sample(options.types, len(options.types)):
            if not any(name in _constraints.CONFLICTS[other] for other in names):
                names.append(name)
        names = names[: rng.randint(1, options.constraints)]
        constraints, answer = _answer(rng, topic, request, names, options)
        if all(_constraints.followed(constraints, answer)):
            break
    called = [_constraints.ask(name, {**given, **_named(given)}) for name, given in constraints]
    question = " ".join([request, *called])
    free = {"language:response_language", "detectable_format:constrained_response"} & set(names)
    return prompt(question, answer, {"constraints": constraints, "about": "" if free else topic})


def _named(given: dict) -> dict:
    """Arguments as a reader wants them: lists with commas, a language by its name."""
    shown = {k: ", ".join(v) for k, v in given.items() if isinstance(v, list)}
    return shown | ({"language": language_names()[given["language"]]} if "language" in given else {})


def _answer(rng: random.Random, topic: str, request: str, names: list[str], options: Options) -> tuple[list, str]:
    """The constraints with their arguments, and a text built to follow them."""
    given: dict[str, dict] = {name: {} for name in names}
    body = [s.format(t=topic) for s in rng.sample(SAYINGS, min(len(SAYINGS), rng.randint(1, options.sentences)))]
    if "language:response_language" in given:
        language = rng.choice(sorted(SPEECH))
        given["language:response_language"] = {"language": language}
        body = list(SPEECH[language])
    if "punctuation:no_comma" in given:
        body = [s.replace(",", " and", 1).replace(",", "") if s.count(",") > 1 else s.replace(",", "") for s in body]
    if "detectable_format:constrained_response" in given:
        return [["detectable_format:constrained_response", {}]], f"My answer is {rng.choice(['yes', 'no', 'maybe'])}."
    _words(rng, given, body)
    spoken = given.get("language:response_language")
    more = SPEECH[spoken["language"]] if spoken else [s.format(t=topic) for s in SAYINGS[:8]]
    text = _shape(rng, given, body, more)
    for name, one in (
        ("title", f"<<On {topic}>>\n{text}"),
        ("json_format", json.dumps({"topic": topic, "text": text})),
    ):
        text = one if f"detectable_format:{name}" in given else text
    if "combination:repeat_prompt" in given:
        given["combination:repeat_prompt"] = {"prompt_to_repeat": request}
        text = f"{request}\n{text}"
    if "detectable_content:postscript" in given:
        given["detectable_content:postscript"] = {"postscript_marker": rng.choice(["P.S.", "P.P.S"])}
        text += f"\n{given['detectable_content:postscript']['postscript_marker']} More soon."
    if "startend:end_checker" in given:
        given["startend:end_checker"] = {"end_phrase": rng.choice(ENDINGS)}
        text += f" {given['startend:end_checker']['end_phrase']}"
    if "change_case:english_capital" in given:
        text = text.upper()
    if "change_case:english_lowercase" in given:
        text = text.lower()
    if "startend:quotation" in given:
        text = f'"{text}"'
    _measure(rng, given, text)
    return [[name, arguments] for name, arguments in given.items()], text


def _words(rng: random.Random, given: dict[str, dict], body: list[str]) -> None:
    """Arguments and sentences for the instructions on words, and on what stands inside sentences."""
    *chosen, once, first, second = rng.sample(KEYWORDS, 5)
    if "keywords:existence" in given:
        given["keywords:existence"] = {"keywords": sorted(chosen)}
        body.append(f"It has to do with a {chosen[0]} and a {chosen[1]}.")
    if "keywords:frequency" in given:
        frequency, relation = rng.randint(1, 3), rng.choice(["less than", "at least"])
        given["keywords:frequency"] = {"keyword": once, "frequency": frequency, "relation": relation}
        body += [
            f"Here is {'another' if i else 'a'} {once}." for i in range(frequency if relation == "at least" else 0)
        ]
    if "keywords:forbidden_words" in given:
        given["keywords:forbidden_words"] = {"forbidden_words": sorted([first, second])}
    if "detectable_content:number_placeholders" in given:
        wanted = rng.randint(1, 4)
        given["detectable_content:number_placeholders"] = {"num_placeholders": wanted}
        body += [f"Ask for {place}." for place in rng.sample(PLACEHOLDERS, wanted)]
    if "change_case:capital_word_frequency" in given:
        relation, frequency = rng.choice(["less than", "at least"]), rng.randint(1, 4)
        given["change_case:capital_word_frequency"] = {"capital_relation": relation, "capital_frequency": frequency}
        body += ["This is GOOD."] * frequency if relation == "at least" else []
    if "detectable_format:number_highlighted_sections" in given:
        wanted = rng.randint(1, 3)
        given["detectable_format:number_highlighted_sections"] = {"num_highlights": wanted}
        body += [f"This is *{word}*." for word in rng.sample(["important", "true", "old", "new"], wanted)]


def _shape(rng: random.Random, given: dict[str, dict], body: list[str], more: Sequence[str]) -> str:
    """The sentences laid out as the instructions on form want it; `more` of them where it takes more."""
    if "length_constraints:number_sentences" in given:
        relation, wanted = rng.choice(["less than", "at least"]), rng.randint(2, 6)
        given["length_constraints:number_sentences"] = {"num_sentences": wanted, "relation": relation}
        body += [more[-1]] * (wanted - len(body) if relation == "at least" else 0)
    parts = [" ".join(body)]
    spare = lambda: rng.choice(more)  # noqa: E731
    if "combination:two_responses" in given:
        return f"{parts[0]}\n******\nShort: {spare()}"
    if "detectable_format:multiple_sections" in given:
        wanted, mark = rng.randint(2, 4), rng.choice(["Section", "SECTION"])
        given["detectable_format:multiple_sections"] = {"section_spliter": mark, "num_sections": wanted}
        parts = [f"{mark} {i + 1}\n{text}" for i, text in enumerate([*parts, *(spare() for _ in range(wanted - 1))])]
    if "detectable_format:number_bullet_lists" in given:
        wanted = rng.randint(1, 5)
        given["detectable_format:number_bullet_lists"] = {"num_bullets": wanted}
        parts += [f"* {spare()}" for _ in range(wanted)]
    text = "\n".join(parts)
    if "length_constraints:number_paragraphs" in given:
        wanted = rng.randint(2, 4)
        given["length_constraints:number_paragraphs"] = {"num_paragraphs": wanted}
        return "\n***\n".join([text, *(spare() for _ in range(wanted - 1))])
    if "length_constraints:nth_paragraph_first_word" in given:
        wanted, word = rng.randint(2, 4), rng.choice(KEYWORDS)
        nth = rng.randint(1, wanted)
        given["length_constraints:nth_paragraph_first_word"] = {
            "num_paragraphs": wanted,
            "nth_paragraph": nth,
            "first_word": word,
        }
        parts = [text, *(spare() for _ in range(wanted - 1))]
        parts[nth - 1] = f"{word.capitalize()} is the word. {parts[nth - 1]}"
        return "\n\n".join(parts)
    return text


def _measure(rng: random.Random, given: dict[str, dict], text: str) -> None:
    """Arguments of the instructions on amounts, from what the finished text has."""
    for name, key, kind in (
        ("length_constraints:number_words", "num_words", ""),
        ("keywords:letter_frequency", "let_frequency", "let_"),
    ):
        if name in given:
            letter = rng.choice("aeinorst" if rng.random() < 0.5 else "bcdfghklmpuwy")
            found = text.lower().count(letter) if kind else _constraints.words(text)
            relation = rng.choice(["less than", "at least"])
            limit = found + rng.randint(1, 5) if relation == "less than" else max(1, found - rng.randint(0, 5))
            given[name] = {key: limit, f"{kind}relation": relation} | ({"letter": letter} if kind else {})


def verify(prompt: dict, completion: str) -> float:
    """1.0 when all is followed, half the share of what is otherwise; 0.0 off the topic, for no more than its name and for
    a copy of the prompt."""
    check = prompt["check"]
    if check.get("about", "").lower() not in completion.lower() or prompt["messages"][-1]["content"] in completion:
        return 0.0
    if _constraints.words(completion) <= _constraints.words(check.get("about", "")):
        return 0.0
    found = _constraints.followed(check["constraints"], completion)
    return 1.0 if all(found) else 0.5 * sum(found) / len(found)
