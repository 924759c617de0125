"""Questions that take tools: what an agent thinks, calls and is told, up to its next turn, which the prompt asks for.

Two forms. "template": the neutral schema (tools, tool_calls, tool messages; the turn to write is `reply`), for chat templates that
take tools. "text": ReAct (Yao et al., arXiv 2210.03629) as Qwen trains it, Thought, Action, Action Input, Observation, Final Answer,
in plain turns, for all templates.
"""

from __future__ import annotations

import datetime
import json
import random
from typing import Any

from stages.tasks import _tools
from stages.tasks._common import plain

REACT = """Answer the question with the tools.
{tools}
Write:
Thought: what to do
Action: a tool's name
Action Input: its parameters as JSON
or, when you know:
Final Answer: the answer, with <co>span</co: call:[result]> around what you found."""

Step = tuple[str, list[tuple[str, dict[str, Any]]]]  # a thought and its calls


def generate(
    rng: random.Random, facts: list[tuple[str, str, str, str]], texts: list[str], form: str, nothing: str
) -> dict:
    """One prompt. facts: (subject, relation, value, sentence), whose sentences are among `texts`; form: as above; nothing: the answer
    where the texts do not say."""
    plan = rng.choice((_lookup, _chain, _sum, _dates, _weekday, _weights, _missing))
    question, steps, answer, span, support, held = plan(rng, facts)
    given = [text for text in texts if text not in held]
    results = [[_tools.run(name, arguments, given) for name, arguments in made] for _, made in steps]
    turn = rng.randint(0, len(steps))  # the step that is asked for; the last one is the answer
    if turn < len(steps):
        wanted = {"calls": [[name, arguments] for name, arguments in steps[turn][1]]}
    else:
        source = _cited(results, support)
        answer = answer.format(v=f"<co>{span}</co: {source[0]}:[{source[1]}]>") if source else nothing
        wanted = {"span": span if source else "", "cites": source, "nothing": nothing}
    names = sorted({name for _, made in steps for name, _ in made} | set(rng.sample(sorted(_tools.TOOLS), 2)))
    check = {"kind": "agent", "tools": names, "texts": given, **wanted}
    write = _template if form == "template" else _text
    return write(question, steps[: turn + 1], results[:turn], turn == len(steps), answer, names) | {"check": check}


def _cited(results: list[list[list[str]]], support: str) -> list[int]:
    """The last call that gave the text which supports the answer, and the text's place there; empty where none did."""
    flat = [result for step in results for result in step]
    return next(([call, flat[call].index(support)] for call in reversed(range(len(flat))) if support in flat[call]), [])


def _lookup(rng: random.Random, facts: list) -> tuple:
    """One search, one answer. Each plan gives: question, steps, answer, its span, the result that supports it, texts to leave out."""
    subject, relation, value, sentence = rng.choice(facts)
    words = {
        "holds": "What does the {s} hold?",
        "is in": "Where is the {s}?",
        "costs": "What does the {s} cost?",
        "weighs": "What does the {s} weigh?",
    }
    said = {
        "holds": "The {s} holds a {{v}}.",
        "is in": "The {s} is in the {{v}}.",
        "costs": "The {s} costs {{v}} coins.",
        "weighs": "The {s} weighs {{v}} kilos.",
    }
    step = (f"I search for the {subject}.", [("search", {"query": f"the {subject} {relation}"})])
    return words[relation].format(s=subject), [step], said[relation].format(s=subject), value, sentence, []


def _missing(rng: random.Random, facts: list) -> tuple:
    question, steps, answer, span, support, _ = _lookup(rng, facts)
    held = [sentence for subject, _, _, sentence in facts if f"the {subject}" in steps[0][0]]
    return question, steps, answer, span, support, held


def _chain(rng: random.Random, facts: list) -> tuple:
    """Where is the thing that holds X: two searches, the second from what the first one tells."""
    holders = [(s, v) for s, relation, v, _ in facts if relation == "holds"]
    places = {s: v for s, relation, v, _ in facts if relation == "is in"}
    both = [(s, v) for s, v in holders if s in places and sum(v == other for _, other in holders) == 1]
    if not both:
        return _lookup(rng, facts)
    subject, content = rng.choice(both)
    steps = [(f"I search for what holds the {content}.", [("search", {"query": f"holds a {content}"})]),
             (f"The {subject} holds it. I search for where that is.", [("search", {"query": f"the {subject} is in"})])]  # fmt: skip
    return (
        f"In which room is the {content}?",
        steps,
        f"The {content} is in the {{v}}.",
        places[subject],
        f"The {subject} is in the {places[subject]}.",
        [],
    )


def _sum(rng: random.Random, facts: list) -> tuple:
    """Two prices from parallel searches, added by the calculator."""
    prices = [(s, int(v)) for s, relation, v, _ in facts if relation == "costs"]
    if len(prices) < 2:
        return _lookup(rng, facts)
    (one, p), (two, q) = rng.sample(prices, 2)
    steps = [("I search for both prices.", [("search", {"query": f"the {one} costs"}), ("search", {"query": f"the {two} costs"})]),
             ("I add the prices.", [("calculate", {"expression": f"{p} + {q}"})])]  # fmt: skip
    return (
        f"What do the {one} and the {two} cost together?",
        steps,
        "Together they cost {v} coins.",
        str(p + q),
        str(p + q),
        [],
    )


def _dates(rng: random.Random, facts: list) -> tuple:
    start = datetime.date(rng.randint(1990, 2030), rng.randint(1, 12), rng.randint(1, 28))
    end = start + datetime.timedelta(days=rng.randint(2, 900))
    call = ("days_between", {"start": start.isoformat(), "end": end.isoformat()})
    return (f"How many days are there from {start} to {end}?", [("I count the days.", [call])], "There are {v}.",
            f"{(end - start).days} days", f"{(end - start).days} days", [])  # fmt: skip


def _weekday(rng: random.Random, facts: list) -> tuple:
    date = datetime.date(rng.randint(1990, 2030), rng.randint(1, 12), rng.randint(1, 28)).isoformat()
    step, found = ("I look the day up.", [("weekday", {"date": date})]), _tools.weekday([], date)[0]
    return f"Which day of the week is {date}?", [step], f"{date} is a {{v}}.", found, found, []


def _weights(rng: random.Random, facts: list) -> tuple:
    unit, into = rng.sample(["gram", "kilogram", "tonne"], 2)
    amount = rng.randint(2, 500) * 10
    found = _tools.convert_weight([], amount, unit, into)[0]
    step = ("I convert the weight.", [("convert_weight", {"amount": amount, "unit": unit, "into": into})])
    return f"What is {amount} {unit} in {into}?", [step], "It is {v}.", found, found, []


def _template(question: str, steps: list[Step], results: list, last: bool, answer: str, names: list[str]) -> dict:
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    count = 0
    turns = []
    for thought, made in steps:
        called = [{"id": str(count + i), "type": "function", "function": {"name": name, "arguments": arguments}}
                  for i, (name, arguments) in enumerate(made)]  # fmt: skip
        turns.append({"role": "assistant", "content": "", "thinking": thought, "tool_calls": called})
        count += len(made)
    for turn, step in zip(turns, results, strict=False):
        told = [{"role": "tool", "tool_call_id": call["id"], "content": [{"type": "text", "text": text} for text in result]}
                for call, result in zip(turn["tool_calls"], step, strict=True)]  # fmt: skip
        messages += [turn, *told]
    row: dict[str, Any] = {"tools": [_tools.schema(name) for name in names]}
    if last:
        return {"messages": messages, "answer": answer, **row}
    reply = turns[len(results)]
    asked = [
        {"tool_call_id": c["id"], "tool_name": c["function"]["name"], "parameters": c["function"]["arguments"]}
        for c in reply["tool_calls"]
    ]
    return {"messages": messages, "answer": f"{reply['thinking']}{json.dumps(asked)}", "reply": reply, **row}


def _text(question: str, steps: list[Step], results: list, last: bool, answer: str, names: list[str]) -> dict:
    described = "\n".join(
        f"{name}: {_tools.TOOLS[name][1]} {json.dumps(list(_tools.TOOLS[name][2]))}" for name in names
    )
    messages = [{"role": "user", "content": f"{REACT.format(tools=described)}\n\nQuestion: {question}"}]
    turns = [f"Thought: {thought}\n" + "\n".join(f"Action: {name}\nAction Input: {json.dumps(arguments)}" for name, arguments in made)
             for thought, made in steps]  # fmt: skip
    count = 0
    for turn, step in zip(turns, results, strict=False):
        lines = [
            f"Observation {count + i}: " + " ".join(f"[{n}] {text}" for n, text in enumerate(result))
            for i, result in enumerate(step)
        ]
        count += len(step)
        messages += [{"role": "assistant", "content": turn}, {"role": "user", "content": "\n".join(lines)}]
    return {"messages": messages, "answer": f"Final Answer: {answer}" if last else turns[len(results)]}


def verify(check: dict[str, Any], completion: str, cited: list) -> float:
    """A call is right (1) when the tools give what the reference's calls give (a search: its best text among others), 0.25 when all
    can at least be run, 0 when they can't; no call is -0.5. An answer: 0.5 for the span and 0.5 for its source. cited: the
    completion's citations."""
    made = _tools.calls(completion)
    if "calls" in check:
        if made is None:
            return -0.5
        try:
            found = [(name, _tools.run(name, arguments, check["texts"])) for name, arguments in made]
        except ValueError:
            return 0.0
        wanted = [(name, _tools.run(name, arguments, check["texts"])) for name, arguments in check["calls"]]
        hit = [any(n == name and (r == result or name == "search" and set(result[:1]) <= set(r)) for n, r in found)
               for name, result in wanted]  # fmt: skip
        return 1.0 if all(hit) and len(found) == len(wanted) else 0.25
    if made is not None:
        return 0.0
    if not plain(completion):
        return -0.5
    if not check["span"]:
        return -0.5 if cited else float(plain(completion).endswith(plain(check["nothing"])))
    if len(cited) != 1:
        return 0.0
    span, sources = cited[0]
    return 0.5 * (plain(span) == plain(check["span"])) + 0.5 * (sources == [tuple(check["cites"])])
