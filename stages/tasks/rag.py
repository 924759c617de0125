"""Questions on numbered documents, answered with a citation in Command A's form: <co>span</co: 0:[source]>.

The documents are generated facts and, as noise, sentences of the corpus. Reward: 0.5 for the right span and 0.5 for the
right source; an answer without citation gets 0.25, a citation where the documents say nothing -0.5.
"""

import random
import re
from dataclasses import dataclass

from stages.stage import option
from stages.tasks._common import plain, prompt, sentences

DOCUMENTS = True  # reads the corpus


@dataclass
class Options:
    facts: int = option(5, "generated facts among the documents of a prompt")
    noise: int = option(3, "sentences of the corpus among the documents of a prompt")
    unanswerable: float = option(0.15, "share of questions that no document answers")
    relations: int = option(4, "kinds of facts, 1 to 4")
    things: int = option(80, "different things that facts are about, at most 80 and more than facts")
    values: int = option(98, "different values of a relation, the first ones of its list")


COLOURS = "red blue green black white grey brown pink gold silver".split()
HOLDERS = "box bag chest drawer jar basket case pot".split()
# Neighbours in the list share neither colour nor holder, so that a few of them still differ in both.
THINGS = [f"{COLOURS[i % 10]} {HOLDERS[(i + i // 40) % 8]}" for i in range(80)]
HELD = "key map lamp coin ring book rope bell knife letter spoon brush clock mirror candle button".split()
ROOMS = "kitchen garden cellar office hall attic garage library".split()
# The document, the question, and the answer with {v} where the cited span stands.
RELATIONS = (
    ("The {k} holds a {v}.", ("What does the {k} hold?", "What is in the {k}?"), "The {k} holds a {v}.", HELD),
    ("The {k} is in the {v}.", ("Where is the {k}?", "In which room is the {k}?"), "The {k} is in the {v}.", ROOMS),
    ("The {k} costs {v} coins.", ("What does the {k} cost?", "How many coins does the {k} cost?"),
     "The {k} costs {v} coins.", [str(n) for n in range(2, 100)]),
    ("The {k} weighs {v} kilos.", ("What does the {k} weigh?", "How heavy is the {k}?"),
     "The {k} weighs {v} kilos.", [str(n) for n in range(2, 100)]),
)  # fmt: skip
ASK = ("Documents:\n{d}\nQuestion: {q}", "{d}\n{q}", "{q}\n{d}", "Use the documents.\n{d}\n{q}")
NOTHING = "The documents do not say."


def check(options: Options) -> str:
    """What is wrong with the options, "" if nothing."""
    if not 1 <= options.facts < options.things <= len(THINGS):
        return f"facts={options.facts} and things={options.things}, expected 1 <= facts < things <= {len(THINGS)}"
    if not 1 <= options.relations <= len(RELATIONS) or options.values < 2 or options.noise < 0:
        return f"expected relations in 1..{len(RELATIONS)}, at least 2 values and noise of at least 0"
    return ""


def generate(rng: random.Random, count: int, documents: list[dict], options: Options) -> list[dict]:
    """`count` questions on documents; without a corpus the noise is left out."""
    noise = sentences(documents, rng, 30, 120) if documents and options.noise else []
    return [_question(rng, noise, options) for _ in range(count)]


def _question(rng: random.Random, noise: list[str], options: Options) -> dict:
    subjects = rng.sample(THINGS[: options.things], options.facts + 1)
    facts = []
    for subject in subjects:
        relation = rng.randrange(min(options.relations, len(RELATIONS)))
        facts.append((subject, relation, rng.choice(RELATIONS[relation][3][: options.values])))
    subject, relation, value = facts[0]
    said, asked, answer, _ = RELATIONS[relation]
    answerable = rng.random() >= options.unanswerable
    told = facts[:-1] if answerable else facts[1:]
    texts = [RELATIONS[r][0].format(k=s, v=v) for s, r, v in told] + rng.sample(noise, min(options.noise, len(noise)))
    rng.shuffle(texts)
    listing = "\n".join(f"[{i}] {text}" for i, text in enumerate(texts))
    question = rng.choice(ASK).format(d=listing, q=rng.choice(asked).format(k=subject))
    if not answerable:
        return prompt(question, NOTHING, {"span": "", "source": -1, "others": []})
    source = texts.index(said.format(k=subject, v=value))
    others = sorted({v for _, _, v in told} - {value})
    cited = answer.format(k=subject, v=f"<co>{value}</co: 0:[{source}]>")
    return prompt(question, cited, {"span": value, "source": source, "others": others})


def citations(text: str) -> list[tuple[str, list[tuple[int, int]]]]:
    """The grounded spans of a text: (span, [(tool call, result), ...])."""
    found = []
    for span, sources in re.findall(r"<co>(.*?)</co: ?((?:\d{1,6}:\[\d{1,6}(?:,\d{1,6})*\],?)+)>", text, re.DOTALL):
        calls = re.findall(r"(\d+):\[([\d,]+)\]", sources)
        found.append((span, [(int(call), int(result)) for call, results in calls for result in results.split(",")]))
    return found


def verify(prompt: dict, completion: str) -> float:
    """Checks the cited span and its source; see the module's text for the values."""
    check, cited = prompt["check"], citations(completion)
    words = set(re.findall(r"\w+", completion.casefold()))
    if check["source"] < 0:
        return -0.5 if cited else float(plain(NOTHING) in plain(completion))
    if len(cited) == 1:
        span, sources = cited[0]
        return 0.5 * (plain(span) in (check["span"], f"a {check['span']}")) + 0.5 * (sources == [(0, check["source"])])
    return 0.25 if not cited and check["span"] in words and not words & set(check["others"]) else 0.0
