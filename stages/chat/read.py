"""What a model has written, as a message: the way back from the chat templates."""

from __future__ import annotations

import json
import re
from typing import Any

from stages.chat.template import CHATML, COMMAND, END_OF_TURN

END = re.compile("|".join(map(re.escape, (END_OF_TURN, *CHATML.tokens))))
THINKING = re.compile(r"<\|START_THINKING\|>(.*?)<\|END_THINKING\|>", re.DOTALL)
ACTION = re.compile(r"<\|START_ACTION\|>(.*?)<\|END_ACTION\|>", re.DOTALL)
CALL = re.compile(r"\n?<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
MARKS = re.compile("|".join(map(re.escape, COMMAND.tokens)))


def read(completion: str) -> dict[str, Any]:
    """The assistant's message in the neutral schema, of a raw completion (special tokens shown) under any of the templates:
    content, and where they are there thinking and tool_calls. Calls that are not whole or not JSON stay text."""
    text = END.split(completion, maxsplit=1)[0]
    found: dict[str, Any] = {"role": "assistant", "content": ""}
    if thinking := THINKING.search(text):
        found["thinking"] = thinking[1]
        text = text[: thinking.start()] + text[thinking.end() :]
    action, blocks = ACTION.search(text), CALL.findall(text)
    try:
        if action:
            found["tool_calls"] = [
                _call(c["tool_call_id"], c["tool_name"], c["parameters"]) for c in _actions(action[1])
            ]
            text = text[: action.start()] + text[action.end() :]
        elif blocks:
            found["tool_calls"] = [_call("", c["name"], c["arguments"]) for c in map(json.loads, blocks)]
            text = CALL.sub("", text)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    if "<|START_RESPONSE|>" in text:
        text = text.split("<|START_RESPONSE|>", 1)[1].split("<|END_RESPONSE|>", 1)[0]
    return found | {"content": MARKS.sub("", text)}


def _actions(text: str) -> list[dict[str, Any]]:
    """The calls of an action: a list, or one a line."""
    return (
        json.loads(text)
        if text.lstrip().startswith("[")
        else [json.loads(one) for one in text.splitlines() if one.strip()]
    )


def _call(id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise TypeError
    return {"type": "function", **({"id": id} if id else {}), "function": {"name": name, "arguments": arguments}}
