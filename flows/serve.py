"""An OpenAI-compatible endpoint for one checkpoint, on loopback: `cuvee serve polished`.

/v1/models and /v1/chat/completions (streaming too): to try a model out with any client. With --rollouts it is also an
engine for reinforcement learning (flows/completions.py). For traffic, give the exported folder to a serving engine.
"""

import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.middleware.trustedhost import TrustedHostMiddleware

from flows.chat import Speaker
from flows.services import check_port
from stages.chat.messages import Refused, declared, message, openai
from stages.chat.read import read
from stages.stage import CuveeError

LOOPBACK = ["127.0.0.1", "localhost"]


class Part(BaseModel):
    """A piece of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[dict] | None = None
    tool_call_id: str | None = None

    def neutral(self) -> dict[str, Any]:
        """In Hugging Face's schema. Raises Refused for a message that is none."""
        text = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""
        return message({**self.model_dump(exclude_none=True), "content": text})


class ChatRequest(BaseModel):
    """What is understood of OpenAI's request; a field outside it is refused, because ignoring it would mislead."""

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0
    n: Literal[1] = 1
    stream: bool = False
    stream_options: dict | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    user: str | None = None
    tools: list[dict] | None = None
    tool_choice: Literal["auto"] = "auto"
    documents: list[dict] | None = None
    safety_mode: Literal["CONTEXTUAL", "STRICT", "NONE"] = "CONTEXTUAL"

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """Clients spell out the fields they don't use as null."""
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


def app(folder: Path, name: str = "", rollouts: bool = False) -> FastAPI:
    """The web application for the checkpoint in `folder`, which clients call `name` (default: the folder's name)."""
    engine = _engine(folder) if rollouts else None
    speaker, name = Speaker(folder, engine), name or folder.name
    api = FastAPI(title=f"Cuvee: {name}", docs_url=None, redoc_url=None)
    # Another site's page must not reach this endpoint under a name of its own that resolves to 127.0.0.1.
    api.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return _refuse(f"{'.'.join(map(str, first['loc'][1:])) or 'body'}: {first['msg']}")

    @api.exception_handler(Refused)
    async def none(request: Request, error: Refused) -> JSONResponse:
        return _refuse(f"{error.reason}, found {error.found}")

    @api.exception_handler(CuveeError)
    async def refused(request: Request, error: CuveeError) -> JSONResponse:
        return _refuse(str(error))

    @api.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "cuvee"}]}

    @api.post("/v1/chat/completions", response_model=None)
    def complete(request: ChatRequest) -> dict | StreamingResponse:
        if request.tools and request.stream:
            raise CuveeError("stream: answers with tools come whole; send stream=false")
        for tool in request.tools or []:
            declared(tool)
        variables = {"tools": request.tools, "documents": request.documents}
        ids = speaker.prompt([one.neutral() for one in request.messages], request.safety_mode, **variables)
        turn = Turn(speaker, name, request, ids)
        return StreamingResponse(turn.stream(), media_type="text/event-stream") if request.stream else turn.whole()

    if engine:
        from flows import completions

        completions.add(api, engine, name)
    return api


def _engine(folder: Path) -> Any:
    import torch

    from stages.rollout.engines.transformers import Engine
    from stages.stage import Context

    return Engine(folder, Context(scratch=folder, device="cuda" if torch.cuda.is_available() else "cpu"))


def _refuse(message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, 400)


class Turn:
    """One answer, whole or as server-sent events."""

    def __init__(self, speaker: Speaker, name: str, request: ChatRequest, ids: list[int]) -> None:
        self.request, self.prompt_tokens = request, len(ids)
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        limit = request.max_completion_tokens or request.max_tokens or speaker.context
        self.reply = speaker.reply(
            ids, max_new_tokens=limit, temperature=request.temperature, top_p=request.top_p, seed=request.seed,
            top=request.top_logprobs if request.logprobs else None,
        )  # fmt: skip

    def _usage(self) -> dict[str, int]:
        read, made = self.prompt_tokens, self.reply.tokens
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def whole(self) -> dict:
        spoken, finish = {"role": "assistant", "content": "".join(self.reply)}, self.reply.finish
        if self.request.tools and (calls := read(self.reply.raw).get("tool_calls")):
            spoken, finish = openai({"role": "assistant", "content": None, "tool_calls": calls}), "tool_calls"
        choice = {"index": 0, "message": spoken, "finish_reason": finish, **self._told()}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": self._usage()}

    def stream(self) -> Iterator[str]:
        yield self._event({"role": "assistant", "content": ""})
        for piece in self.reply:
            yield self._event({"content": piece})
        yield self._event({}, self.reply.finish)
        if (self.request.stream_options or {}).get("include_usage"):
            yield self._data({"choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _event(self, delta: dict, finish: str | None = None) -> str:
        return self._data({"choices": [{"index": 0, "delta": delta, "finish_reason": finish, **self._told()}]})

    def _told(self) -> dict[str, Any]:
        """Log-probabilities of the tokens made since the last time, where they were asked for."""
        if not self.request.logprobs:
            return {}
        told, self.reply.told = self.reply.told, []

        def shown(token: int, nats: float) -> dict[str, Any]:
            text = self.reply.speaker.tokenizer.decode([token])
            return {"token": text, "logprob": nats, "bytes": list(text.encode())}

        content = [{**shown(token, nats), "top_logprobs": [shown(*pair) for pair in top]} for token, nats, top in told]
        return {"logprobs": {"content": content}}

    def _data(self, body: dict) -> str:
        return "data: " + json.dumps({**self.head, "object": "chat.completion.chunk", **body}) + "\n\n"


def serve(folder: Path, name: str = "", port: int = 8000, rollouts: bool = False) -> None:
    """Serve until Ctrl-C. Raises CuveeError when the port is taken."""
    import uvicorn

    check_port("--port", port)
    api = app(folder, name, rollouts)  # a large model takes a while to load
    print(f"http://127.0.0.1:{port}/v1 serves {name or folder.name}; Ctrl-C ends", flush=True)
    uvicorn.run(api, host="127.0.0.1", port=port, log_level="warning")
