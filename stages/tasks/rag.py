"""Questions on numbered documents, answered with a citation in Command A's form: <co>span</co: 0:[source]>.

Kinds: "facts", generated facts and, as noise, sentences of the corpus; "retrieval", facts planted in chunks of the corpus, of which
hybrid retrieval (stages/tasks/_retrieval.py) gives the documents; "agent", the next turn of an agent with tools that run
(stages/tasks/_agents.py). Reward of the first two: 0.5 for the right span and 0.5 for the right source; an answer without
citation gets 0.25, a citation where the documents say nothing -0.5.

Your own prompts: `check` is {"span": words, "source": number of the document or -1 for none, "others": words that would be wrong};
where there is none, the answer is "The documents do not say."
"""

import random
import re
from dataclasses import dataclass

from stages.stage import CuveeError, option
from stages.tasks import _agents
from stages.tasks._common import draw, holds, plain, prompt, sentences
from stages.tasks._retrieval import Chunk, Index, chunks

DOCUMENTS = True  # reads the corpus
KINDS = ("facts", "retrieval", "agent")
FORMS = ("text", "template")


@dataclass
class Options:
    kinds: list[str] = option(["facts"], "kinds of prompts, each as often", choices=KINDS)
    form: str = option("text", "documents and tools as text of the turns, or as the chat template writes them", choices=FORMS)
    pool: int = option(60, "chunks of the corpus that retrieval searches, a prompt")
    chunk: int = option(300, "characters of a chunk")
    retrieved: int = option(5, "chunks that retrieval gives")
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
    if not options.kinds or min(options.pool, options.chunk, options.retrieved) < 1 or options.pool < options.facts:
        return f"expected one of the kinds {', '.join(KINDS)}, a pool of at least facts={options.facts}, chunk and retrieved of at least 1"
    return ""


def generate(rng: random.Random, count: int, documents: list[dict], options: Options) -> list[dict]:
    """`count` questions on documents; without a corpus the noise is left out. Raises CuveeError when a kind needs one."""
    noise = sentences(documents, rng, 30, 120) if documents and options.noise else []
    searched = documents[:2000] if "retrieval" in options.kinds else []
    pool = [c for d in searched for c in chunks(d["text"], options.chunk) if 40 <= len(c.text) <= 2 * options.chunk]
    if "retrieval" in options.kinds and len(pool) < options.facts:
        raise CuveeError(f"the rag task found {len(pool)} chunks of 40 to {2 * options.chunk} characters in the corpus for its kind "
                         f"retrieval; it needs at least {options.facts}: give more text or a larger chunk")  # fmt: skip
    make = {"facts": lambda: _question(rng, noise, options), "retrieval": lambda: _retrieved(rng, pool, options),
            "agent": lambda: _agent(rng, noise, options)}  # fmt: skip
    return [make[draw(rng, options.kinds)]() for _ in range(count)]


def _retrieved(rng: random.Random, pool: list[Chunk], options: Options) -> dict:
    """A question on facts that stand in chunks of a pool, with the chunks that retrieval gives: perhaps without the one."""
    facts = _facts(rng, options)
    subject, relation, value = facts[0]
    told = facts if rng.random() >= options.unanswerable else facts[1:]
    searched = rng.sample(pool, min(options.pool, len(pool)))
    places = rng.sample(range(len(searched)), len(told))
    for place, (s, r, v) in zip(places, told, strict=True):
        parts = re.split(r"(?<=[.!?]) ", searched[place].text)
        parts.insert(rng.randint(0, len(parts)), RELATIONS[r][0].format(k=s, v=v))
        searched[place] = Chunk(" ".join(parts), searched[place].context)
    asked = rng.choice(RELATIONS[relation][1]).format(k=subject)
    found = Index(searched).search(asked, options.retrieved)
    rng.shuffle(found)
    source = found.index(places[0]) if told is facts and places[0] in found else -1
    others = {v for place, (_, _, v) in zip(places, told, strict=True) if place in found} - {value}
    return _prompt(rng, asked, [searched[i].text for i in found], (subject, relation, value), source, sorted(others), options)


def _agent(rng: random.Random, noise: list[str], options: Options) -> dict:
    """The next turn of an agent whose texts are facts and noise; each thing has several relations, so that they can be chained."""
    things = rng.sample(THINGS[: options.things], max(1, (options.facts + 1) // 2))
    facts = []
    for thing in things:
        for relation in rng.sample(range(options.relations), min(2, options.relations)):
            value = rng.choice(RELATIONS[relation][3][: options.values])
            said = RELATIONS[relation][0].format(k=thing, v=value)
            facts.append((thing, ("holds", "is in", "costs", "weighs")[relation], value, said))
    texts = [said for *_, said in facts] + rng.sample(noise, min(options.noise, len(noise)))
    rng.shuffle(texts)
    return _agents.generate(rng, facts, texts, options.form, NOTHING)


def _facts(rng: random.Random, options: Options) -> list[tuple[str, int, str]]:
    """Subject, relation and value of one more fact than the options say, about different subjects."""
    subjects = rng.sample(THINGS[: options.things], options.facts + 1)
    facts = []
    for subject in subjects:
        relation = rng.randrange(options.relations)
        facts.append((subject, relation, rng.choice(RELATIONS[relation][3][: options.values])))
    return facts


def _question(rng: random.Random, noise: list[str], options: Options) -> dict:
    facts = _facts(rng, options)
    subject, relation, value = facts[0]
    said, asked, _, _ = RELATIONS[relation]
    answerable = rng.random() >= options.unanswerable
    told = facts[:-1] if answerable else facts[1:]
    texts = [RELATIONS[r][0].format(k=s, v=v) for s, r, v in told] + rng.sample(noise, min(options.noise, len(noise)))
    rng.shuffle(texts)
    source = texts.index(said.format(k=subject, v=value)) if answerable else -1
    others = sorted({v for _, _, v in told} - {value}) if answerable else []
    return _prompt(rng, asked, texts, facts[0], source, others, options)


def _prompt(
    rng: random.Random, asked: str | tuple[str, ...], texts: list[str], fact: tuple[str, int, str], source: int, others: list[str], options: Options
) -> dict:
    """The prompt in its form, with the answer that cites `source`, or says that there is none (-1)."""
    subject, relation, value = fact
    as_text = options.form == "text"
    form, extra = (rng.choice(ASK), {}) if as_text else ("{q}", {"documents": [{"text": text} for text in texts]})
    asked = asked if isinstance(asked, str) else rng.choice(asked).format(k=subject)
    question = form.format(d="\n".join(f"[{i}] {text}" for i, text in enumerate(texts)), q=asked)
    if source < 0:
        return prompt(question, NOTHING, {"span": "", "source": -1, "others": []}, **extra)
    cited = RELATIONS[relation][2].format(k=subject, v=f"<co>{value}</co: 0:[{source}]>")
    return prompt(question, cited, {"span": value, "source": source, "others": others}, **extra)


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
    if check.get("kind") == "agent":
        return _agents.verify(check, completion, cited)
    if not plain(completion):
        return -0.5
    if check["source"] < 0:
        return -0.5 if cited else float(plain(completion) == plain(NOTHING))
    wanted = plain(check["span"])
    if len(cited) == 1:
        span, sources = cited[0]
        return 0.5 * (plain(span) in (wanted, f"a {wanted}")) + 0.5 * (sources == [(0, check["source"])])
    said, wrong = plain(completion), map(plain, check.get("others", []))
    return 0.25 * (not cited and holds(said, wanted) and plain(NOTHING) not in said and not any(holds(said, other) for other in wrong))
