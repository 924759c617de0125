"""A rollout engine over HTTP, as stages/rollout/engines/openai.py asks one: `cuvee serve A --rollouts`.

/v1/completions takes and gives token ids with their log-probabilities; /update_weights_from_disk (as SGLang has it) makes
the model another. One request at a time: for traffic, and on more than one GPU, take a serving engine.
"""

import threading
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from stages.stage import CuveeError


class CompletionRequest(BaseModel):
    """What is understood of OpenAI's request, and vLLM's fields about token ids; a field outside it is refused."""

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    prompt: list[int] | str
    n: int = Field(1, ge=1, le=4096)
    max_tokens: int = Field(16, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: Literal[1] = 1
    seed: int = 0
    logprobs: int | None = Field(None, ge=0, le=1)
    echo: bool = False
    stop_token_ids: list[int] = []
    logit_bias: dict[int, Literal[-100]] = {}
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False


class WeightsRequest(BaseModel):
    model_path: str


def add(api: FastAPI, engine: Any, name: str) -> None:
    """The two routes, of `engine` (stages/rollout/engines/transformers.py)."""
    lock = threading.Lock()

    @api.post("/v1/completions")
    def complete(request: CompletionRequest) -> dict:
        ids = request.prompt
        if isinstance(ids, str):
            ids = engine.tokenizer.encode(ids, add_special_tokens=False)
        longest, rows = engine.model.config.max_position_embeddings, len(engine.tokenizer)
        if not ids or len(ids) + request.max_tokens > longest or not all(0 <= i < engine.model.config.vocab_size for i in ids):
            raise CuveeError(f"prompt: {len(ids)} tokens and max_tokens {request.max_tokens}; give at least 1, no more than "
                             f"{longest} of both together, and ids from 0 to {rows - 1}")  # fmt: skip
        if any(token < rows for token in request.logit_bias):
            raise CuveeError(f"logit_bias: tokens below {rows} can't be forbidden; those without text never come")
        if request.echo != (request.max_tokens == 0):
            raise CuveeError("echo: a prompt's log-probabilities are given with echo true and max_tokens 0, not otherwise")
        with lock:
            choices = _echoed(engine, ids) if request.echo else _sampled(engine, request, ids)
        return {"object": "text_completion", "model": name, "choices": [
            _choice(i, engine.tokenizer, request, *choice) for i, choice in enumerate(choices)
        ]}  # fmt: skip

    @api.post("/update_weights_from_disk")
    def update(request: WeightsRequest) -> dict:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        files = sorted(Path(request.model_path).glob("*.safetensors"))
        if not files:
            raise CuveeError(f"model_path: {request.model_path} holds no safetensors; give a checkpoint's folder")
        try:
            weights = {key: tensor for file in files for key, tensor in load_file(file).items()}
        except (SafetensorError, OSError) as error:
            raise CuveeError(f"model_path: {request.model_path} can't be read ({error}); give a whole checkpoint") from None
        with lock:
            engine.sync_weights(weights)
        return {"success": True, "message": f"the weights of {request.model_path}"}


def _echoed(engine: Any, ids: list[int]) -> list[tuple[list[int], list[float | None], str]]:
    nats = engine.logprobs([ids])[0].tolist() if len(ids) > 1 else []
    return [(ids, [None, *nats], "length")]


def _sampled(engine: Any, request: CompletionRequest, ids: list[int]) -> list[tuple[list[int], list[float], str]]:
    stop = request.stop_token_ids or [engine.tokenizer.eos_token_id]
    (rows,) = engine.generate([ids], n=request.n, max_new_tokens=request.max_tokens, temperature=request.temperature,
                             seed=request.seed, stop=stop)  # fmt: skip
    return [(row.ids, row.logprobs, "stop" if row.ids[-1] in stop else "length") for row in rows]


def _choice(index: int, tokenizer: Any, request: CompletionRequest, ids: list[int], nats: list, finish: str) -> dict:
    shown = ids[:-1] if finish == "stop" else ids
    choice = {"index": index, "finish_reason": finish, "logprobs": None,
              "text": tokenizer.decode(shown, skip_special_tokens=request.skip_special_tokens)}  # fmt: skip
    if request.logprobs is not None:
        as_ids = request.return_tokens_as_token_ids
        tokens = [f"token_id:{i}" if as_ids else tokenizer.decode([i]) for i in ids]
        choice["logprobs"] = {"tokens": tokens, "token_logprobs": nats}
    return choice | ({"token_ids": ids} if request.return_token_ids else {})
