"""A teacher as judge: which of two answers is better, asked in both orders, and how good an answer is on a scale of five.

The judge reasons before it decides and answers JSON; an answer in another form counts as a tie, or as 0, and is counted.
A judge prefers what it reads first (Zheng et al. 2023, arXiv 2306.05685, section 3.3): a preference that does not outlast
the exchange of the two is a tie.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from stages.chat.messages import said
from stages.chat.render import response
from stages.stage import Context
from stages.teacher.client import Client, Request, Teacher

PAIR = """You compare two answers to the last message of a conversation. Judge whether they are right, follow the instructions, \
and are of use, in this order; not their length, style or order.{reference}

[Conversation]
{conversation}

[Answer A]
{a}

[Answer B]
{b}

First write down your reasons, then which answer is better, as one JSON object:
{{"reasons": "...", "better": "A" or "B" or "tie"}}"""
SCALE = """You grade an answer to the last message of a conversation. Give a point for each of these that holds: it answers what was \
asked; nothing in it is wrong; it follows every instruction; it leaves out nothing that matters; an expert would sign it.{reference}

[Conversation]
{conversation}

[Answer]
{answer}

First write down your reasons, then the number of points, as one JSON object:
{{"reasons": "...", "points": 0 to 5}}"""
BETTER, POINTS = re.compile(r'"better"\s*:\s*"(A|B|tie)"'), re.compile(r'"points"\s*:\s*"?([0-5])\b')
FIXED = {"temperature": 0.0}


@dataclass(frozen=True)
class Verdicts:
    """wins: of each prompt 1 where the first answer is better, 0 where the second is, 0.5 for a tie. consistent: share of
    the prompts whose verdict outlasts the exchange of the answers. unreadable: judgements of 2 * len(wins) in another form."""

    wins: list[float]
    consistent: float
    unreadable: int


def comparisons(judge: str, rows: list[dict[str, Any]], first: list[str], second: list[str]) -> list[Request]:
    """The requests of `compare`: of each row with the first answer as A, then as B."""
    return [
        Request(judge, [_ask(PAIR, row, a=a, b=b)], options=FIXED)
        for row, x, y in zip(rows, first, second, strict=True)
        for a, b in ((x, y), (y, x))
    ]


def compare(client: Client, judge: str, rows: list[dict[str, Any]], first: list[str], second: list[str]) -> Verdicts:
    """Whether the `first` or the `second` text answers each row (with `messages`, and an `answer` if it is known) better."""
    found = [_read(BETTER, done.text) for done in client.complete(comparisons(judge, rows, first, second))]
    wins, same = [], 0
    for straight, exchanged in zip(found[::2], found[1::2], strict=True):
        again = {"A": "B", "B": "A"}.get(exchanged, exchanged)
        same += straight == again and straight != ""
        wins.append({"A": 1.0, "B": 0.0}.get(straight, 0.5) if straight == again else 0.5)
    return Verdicts(wins, same / len(wins) if wins else 1.0, found.count(""))


def grades(judge: str, rows: list[dict[str, Any]], answers: list[list[str]]) -> list[Request]:
    """The requests of `grade`, row by row."""
    return [Request(judge, [_ask(SCALE, row, answer=text)], options=FIXED)
            for row, texts in zip(rows, answers, strict=True) for text in texts]  # fmt: skip


def grade(client: Client, judge: str, rows: list[dict[str, Any]], answers: list[list[str]]) -> list[list[float]]:
    """Points, 0 to 5, in the shape of `answers`; 0 for a judgement in another form."""
    found = iter([float(_read(POINTS, done.text) or 0) for done in client.complete(grades(judge, rows, answers))])
    return [[next(found) for _ in texts] for texts in answers]


class Grader:
    """A judge as a reward: its points over five, of what the user would read of each completion. Kept in the scratch folder
    by request, so that a run which goes on pays nothing twice."""

    def __init__(self, name: str, teacher: Teacher, budget: float, ctx: Context):
        self.name, self.client = name, Client({name: teacher}, ctx.scratch / "grades", budget=budget, log=ctx.log)

    def __call__(self, prompts: list[dict[str, Any]], completions: list[list[str]]) -> list[list[float]]:
        """0 to 1, a row a prompt."""
        answers = [[response(text) for text in texts] for texts in completions]
        return [[points / 5 for points in row] for row in grade(self.client, self.name, prompts, answers)]


def _ask(form: str, row: dict[str, Any], **texts: str) -> dict[str, str]:
    documents = [f"document {i}: {json.dumps(one, ensure_ascii=False)}" for i, one in enumerate(row.get("documents") or [])]
    told = "\n\n".join([*documents, *(f"{m['role']}: {said(m)}" for m in row["messages"])])
    known = f"\n\n[An answer known to be right]\n{row['answer']}" if row.get("answer") else ""
    return {"role": "user", "content": form.format(conversation=told, reference=known, **texts)}


def _read(form: re.Pattern, text: str) -> str:
    """The last of what `form` finds, "" for nothing: reasons may quote it before."""
    found = form.findall(text)
    return found[-1] if found else ""
