"""Valid JSON, for prompts with `check.schema` (a JSON schema, draft 2020-12) or with tools: 1 when it fits, 0 when it is JSON that does
not, -1 without JSON. A response with tools fits when each of its calls names a tool and has its parameters; one without any call
is not judged unless `check.calls` says that calls are wanted; where `check` has a `span`, an answer is, and a call is 0."""

from typing import Any

from stages.rewards._common import Checked
from stages.tasks import _tools
from stages.tasks._common import json_in


class Reward(Checked):
    @staticmethod
    def applies(prompt: dict[str, Any]) -> bool:
        return bool("schema" in prompt["check"] or prompt.get("tools") or prompt["check"].get("tools"))

    def score(self, prompt: dict[str, Any], text: str) -> float | None:
        check = prompt["check"]
        if "schema" in check:
            value = next(json_in(text), None)
            return -1.0 if value is None else float(not _tools.fault(value, check["schema"]))
        calls = _tools.calls(text)
        if calls is None:
            return -1.0 if check.get("calls") else None
        if "span" in check and "calls" not in check:
            return 0.0
        given = prompt.get("tools") or [_tools.schema(name) for name in check["tools"]]
        known = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in given}
        return float(all(name in known and not _tools.fault(arguments, known[name]) for name, arguments in calls))
