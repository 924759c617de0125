"""Conversations in Hugging Face's neutral message schema, from what users write: checked and brought into one form.

A record has `messages` (or `prompt` and `completion`, as TRL has them) and, if it likes, what the chat templates take
beside them (stages.chat.render.VARIABLES). A message has a role and a text or a list of parts; the assistant's may have
`thinking` and `tool_calls`, whose arguments may be an object or OpenAI's JSON text.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from stages.chat.render import VARIABLES

CITED = re.compile(r"</co: ([^<>]*)>")  # Command A's: call: [results], call: [results]
SOURCE = re.compile(r"(\d+):\[([\d, ]+)\]")
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
PARTS = ("text", "thinking", "document")
TYPES = {"tools": list, "documents": list, "safety_mode": str, "reasoning": bool, "citations": bool,
         "response_format": dict}  # fmt: skip


class Refused(ValueError):
    """A record that is no conversation to train on. reason: the same sentence for every record of this kind; found: what
    stands there instead."""

    def __init__(self, reason: str, found: Any = ""):
        super().__init__(reason)
        self.reason, self.found = reason, found if isinstance(found, str) else json.dumps(found, default=str)


def conversation(record: Any) -> dict[str, Any]:
    """`messages`, ending with the assistant's, and what the record has of VARIABLES. Raises Refused."""
    if not isinstance(record, dict):
        raise Refused("no JSON object", record)
    record = _present(record)
    row: dict[str, Any] = {"messages": [message(one) for one in _messages(record)]}
    for name in VARIABLES:
        if name in record:
            row[name] = _decoded(record[name]) if TYPES[name] in (list, dict) else record[name]
            if not isinstance(row[name], TYPES[name]):
                raise Refused(f"{name}: expected {TYPES[name].__name__}", row[name])
    known = {declared(tool) for tool in row.get("tools", [])}
    if not all(isinstance(document, dict) for document in row.get("documents", [])):
        raise Refused("documents: expected a list of objects", row["documents"])
    _order(row["messages"])
    _citations(row)
    called = {call["function"]["name"] for one in row["messages"] for call in one.get("tool_calls", [])}
    if unknown := sorted(called - known):
        raise Refused("tool_calls: a function that `tools` does not declare", unknown)
    return row


def preference(record: Any) -> dict[str, Any]:
    """`messages` up to where the assistant answers, `completions` (two or more texts) with `rewards`, and what the record has
    of VARIABLES. `chosen` and `rejected` are rewarded 1 and 0; or the record has `completions` and `rewards`. An answer is a text
    or messages, of which the ones before the last are the prompt, which is otherwise `prompt` or `messages`. Raises Refused."""
    if not isinstance(record, dict):
        raise Refused("no JSON object", record)
    record = _present(record)
    if "chosen" in record and "rejected" in record:
        answers, rewards = [record["chosen"], record["rejected"]], [1.0, 0.0]
    else:
        answers, rewards = _decoded(record.get("completions")), _decoded(record.get("rewards"))
    if not isinstance(answers, list) or len(answers) < 2:
        raise Refused("expected chosen and rejected, or completions (two or more) and rewards", sorted(record))
    numbers = isinstance(rewards, list) and all(type(r) in (int, float) and math.isfinite(r) for r in rewards)
    if not numbers or len(rewards) != len(answers):
        raise Refused("rewards: expected a finite number for each of completions", rewards)
    prompt = record.get("prompt", record.get("messages", []))
    prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    own = {name: record[name] for name in VARIABLES if name in record}
    rows = [conversation({**own, "messages": _before(answer, prompt)}) for answer in answers]
    if any(row["messages"][:-1] != rows[0]["messages"][:-1] for row in rows):
        raise Refused("the answers are to different prompts", [row["messages"][:-1] for row in rows])
    last = [row["messages"][-1] for row in rows]
    if any(one.keys() != {"role", "content"} or not isinstance(one["content"], str) for one in last):
        raise Refused("the answers: expected texts, without thinking or calls", last)
    rewards = [float(reward) for reward in rewards]
    return rows[0] | {"messages": rows[0]["messages"][:-1], "completions": [one["content"] for one in last], "rewards": rewards}


def _before(answer: Any, prompt: list[Any]) -> list[Any]:
    """The conversation that ends with an answer."""
    turns = answer if isinstance(answer, list) else [answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}]
    return turns if len(turns) > 1 else [*prompt, *turns]


def _present(value: Any) -> Any:
    """Without the nulls that Parquet has for absent fields."""
    if isinstance(value, dict):
        return {key: _present(one) for key, one in value.items() if one is not None}
    return [_present(one) for one in value] if isinstance(value, list) else value


def _decoded(value: Any) -> Any:
    """The value of a JSON text, as Parquet files have for what has no fixed fields; any other text as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _messages(record: dict[str, Any]) -> list[Any]:
    found = record.get("messages")
    if found is None and "prompt" in record and "completion" in record:
        sides = (("user", record["prompt"]), ("assistant", record["completion"]))
        found = [
            m for role, side in sides for m in (side if isinstance(side, list) else [{"role": role, "content": side}])
        ]
    if not isinstance(found, list) or not found:
        raise Refused("messages: expected a list of messages (or prompt and completion)", sorted(record))
    return found


def message(one: Any) -> dict[str, Any]:
    """A message in the one form. Raises Refused."""
    if not isinstance(one, dict) or one.get("role") not in ROLES:
        raise Refused(f"messages: expected roles {', '.join(ROLES)}", one)
    role, content = ROLES[one["role"]], one.get("content", "")
    result = role == "tool" and isinstance(content, (dict, list))
    if isinstance(content, list) and not result:
        if not all(isinstance(part, dict) and part.get("type") in PARTS for part in content):
            raise Refused(f"content: expected a text, or parts of type {', '.join(PARTS)}", content)
        if all(part["type"] == "text" and isinstance(part.get("text"), str) for part in content):
            content = "\n".join(part["text"] for part in content)  # as the templates that take parts write them
    elif not isinstance(content, str) and not result:
        raise Refused("content: expected a text or a list of parts", content)
    found = {"role": role, "content": content}
    for name in ("thinking", "tool_plan", "name", "tool_call_id"):
        if name in one:
            if not isinstance(one[name], str):
                raise Refused(f"{name}: expected a text", one[name])
            found[name] = one[name]
    if one.get("tool_calls"):
        if role != "assistant" or not isinstance(one["tool_calls"], list):
            raise Refused("tool_calls: expected a list, in a message of the assistant", one["tool_calls"])
        found["tool_calls"] = [_call(call) for call in one["tool_calls"]]
    return found


def openai(one: dict[str, Any]) -> dict[str, Any]:
    """A message of the neutral schema as OpenAI has it: a call's arguments and a tool's result are JSON texts, and what was thought
    is left out (servers refuse fields that they don't know)."""
    found = {key: value for key, value in one.items() if key not in ("thinking", "tool_plan")}
    if found.get("tool_calls"):
        found["tool_calls"] = [
            {**c, "id": c.get("id", f"call_{i}"), "function": {**c["function"], "arguments": _text(c["function"]["arguments"])}}
            for i, c in enumerate(found["tool_calls"])
        ]  # fmt: skip
    if found["role"] == "tool":
        found["content"] = _text(found["content"])
    return found


def said(turn: dict[str, Any]) -> str:
    """A turn as text: what it says, the texts of its parts, the calls it makes as JSON."""
    content = turn.get("content") or ""
    content = content if isinstance(content, list) else [content]
    parts = [p.get("text") or _text(p) if isinstance(p, dict) else p for p in content]
    return "\n".join([*filter(None, parts), *(_text(call["function"]) for call in turn.get("tool_calls") or [])])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused("tool_calls: expected {type: function, function: {name, arguments}}", call)
    arguments = _decoded(function.get("arguments", {}))
    if not isinstance(arguments, dict):
        raise Refused("tool_calls: expected arguments as an object, or its JSON text", arguments)
    own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **own, "function": {"name": function["name"], "arguments": arguments}}


def declared(tool: Any) -> str:
    """The name of a tool in JSON schema. Raises Refused."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused("tools: expected {type: function, function: {name, description, parameters}}", tool)
    return function["name"]


def _order(messages: list[dict[str, Any]]) -> None:
    """Raises Refused for turns that no chat has."""
    roles = [m["role"] for m in messages]
    spoken = [role for role in roles if role != "system"]
    if spoken[:1] != ["user"]:
        raise Refused("messages: the first one after the system message must be the user's", roles)
    if any(m["role"] == "assistant" and not m["content"] and "tool_calls" not in m for m in messages):
        raise Refused("messages: an assistant's message without content or tool_calls", messages)
    if roles[-1] != "assistant":
        raise Refused("messages: the last one must be the assistant's", roles)
    waiting = 0  # calls without their result; those of the last message may go without
    for one in messages:
        waiting -= one["role"] == "tool"
        if waiting and one["role"] != "tool":
            raise Refused("messages: tool_calls and the tool messages that answer them differ in number", roles)
        waiting += len(one.get("tool_calls", []))


def answered(row: dict[str, Any]) -> list[int]:
    """Of each tool message the number of the call that it answers. Calls are numbered over the conversation, after the documents,
    as the chat templates number them; a message without an id of theirs answers the first call that is open."""
    found, count = [], int(bool(row.get("documents")))
    open_: dict[str, int] = {}  # of the last turn's calls: id -> number
    for one in row["messages"]:
        if calls := one.get("tool_calls"):
            open_ = {call.get("id", str(i)): count + i for i, call in enumerate(calls)}
            count += len(calls)
        elif one["role"] == "tool" and open_:
            found.append(open_.pop(one["tool_call_id"] if one.get("tool_call_id") in open_ else next(iter(open_))))
    return found


def _citations(row: dict[str, Any]) -> None:
    """Raises Refused for a citation of a result that no call before has given."""
    held, numbers = {0: len(row.get("documents", []))}, iter(answered(row))
    for one in row["messages"]:
        if one["role"] == "assistant":
            for cited in CITED.findall(said(one) + one.get("thinking", "")):
                for call, places in SOURCE.findall(cited):
                    if any(int(place) >= held.get(int(call), 0) for place in re.findall(r"\d+", places)):
                        raise Refused("citations: of a document or result that is not there", cited)
        elif one["role"] == "tool":
            held[next(numbers)] = len(one["content"]) if isinstance(one["content"], list) else 1
