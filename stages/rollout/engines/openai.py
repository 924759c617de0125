"""Rollouts through a server with OpenAI's completions API that also tells token ids: vLLM, SGLang, `cuvee serve --rollouts`.

Prompts go as token ids, so that no second tokenizer can differ. The server must hold the policy: its new weights are
written as a Hugging Face folder that both see, and the server is told to read it (`sync`). A server that can't be told is
used only while it serves what it should, which the parity probe, or a forward pass on this CPU, finds out.

Every run of the tests has `cuvee serve`, one with CUVEE_VLLM (tests/unit/test_rollout_openai.py) vLLM, 0.32 when last tried;
SGLang's part is from its documentation and was not tried.

engine_options: url, model, and what else `Options` names; the key of a server is taken from the environment.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.rollout.engines._engine import Completion, parity
from stages.stage import ConfigError, Context, CuveeError, parse, placement

if TYPE_CHECKING:
    import torch

REMOTE = True  # one process asks for all
VOUCHED = 4  # sequences by which a server that takes no weights is compared with this CPU


@dataclass
class Options:
    url: str = placement("", "address of the API up to /v1, e.g. http://127.0.0.1:8000/v1")
    model: str = placement("", "the name by which the server knows the model")
    key: str = placement("", "name of the environment variable with the server's key; empty sends none")
    sync: str = placement("disk", "how it takes new weights: disk (/update_weights_from_disk: SGLang, cuvee serve), vllm "
                                  "(its dev mode's /collective_rpc), none", ("disk", "vllm", "none"))  # fmt: skip
    tolerance: float = placement(0.5, "nats by which its log-probabilities may differ; BF16 knows logits of 30 to 0.1")
    concurrency: int = placement(64, "requests under way at once")
    timeout: float = placement(1800.0, "seconds that a request may take")


def check_options(values: dict[str, Any]) -> Options:
    """Raises ConfigError for options that no server could have."""
    own = parse(Options, values, "engine_options")
    if not own.url.startswith(("http://", "https://")):
        raise ConfigError(f"engine_options.url: {own.url!r} is no address; give one such as http://127.0.0.1:8000/v1")
    if own.concurrency < 1 or min(own.timeout, own.tolerance) <= 0:
        raise ConfigError(f"engine_options: concurrency is {own.concurrency}, timeout {own.timeout:g}, tolerance "
                          f"{own.tolerance:g}; give at least 1, and more than 0 of the others")  # fmt: skip
    return own


def prepare(path: Path, folder: Path) -> None:
    """Make `folder` the checkpoint at `path`, but for its weights."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(path, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.jsonl"))


class Engine:
    """The server as an engine. `path`: the CHECKPOINT folder of its tokenizer, and of its weights without a `state`."""

    def __init__(
        self, path: Path, ctx: Context, state: dict[str, torch.Tensor] | Path | None = None,
        options: dict[str, Any] | None = None,
    ):  # fmt: skip
        import httpx
        from transformers import AutoConfig, AutoTokenizer

        self.options = own = check_options(options or {})
        if own.key and own.key not in os.environ:
            raise ConfigError(f"engine_options.key: the environment has no variable {own.key}; set it to the server's key")
        headers = {"Authorization": f"Bearer {os.environ[own.key].strip()}"} if own.key else {}
        limits = httpx.Limits(max_connections=own.concurrency)
        self.client = httpx.Client(headers=headers, timeout=own.timeout, limits=limits)
        self.threshold, self.path, self.written = own.tolerance, path, ctx.scratch / "engine"
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        rows = range(len(self.tokenizer), AutoConfig.from_pretrained(path).vocab_size)
        self.never = {"logit_bias": {str(row): -100 for row in rows}} if rows else {}  # tokens without text
        if state is not None:
            self.sync_weights(state, first=True)
        elif own.sync != "none":
            self._load(path)
        else:
            self._vouch(path, ctx)

    def sync_weights(self, state: dict[str, torch.Tensor] | Path, first: bool = False) -> None:
        """Have the server hold these weights, by their Hugging Face names, or those that a folder has been given (`prepare`).
        Raises CuveeError where it takes none."""
        from safetensors.torch import save_file

        if self.options.sync == "none":
            if first:  # whether they are the ones it serves is the probe's to say
                return
            raise CuveeError("engine_options.sync: none, but the policy has new weights; set it to what the server offers "
                             "(disk, vllm), sample once with rollout_every=0, or take engine transformers")  # fmt: skip
        if isinstance(state, Path):
            self._load(state)
            return
        prepare(self.path, self.written)
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, self.written / "model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
        self._load(self.written)

    def differences(self, state: dict[str, torch.Tensor]) -> None:
        """A server shows no weights."""

    def logprobs(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """Of each sequence of T tokens, float32 [T-1]: log p(token t | tokens before), t = 1..T-1, nats."""
        found = []
        for tokens in sequences:
            (choice,) = self._complete(tokens, max_tokens=0, echo=True, temperature=0.0)
            nats = (choice.get("logprobs") or {}).get("token_logprobs") or []
            if len(nats) != len(tokens) or None in nats[1:]:
                raise CuveeError(f"{self.options.url}: no log-probabilities of a prompt's tokens came back (echo, "
                                 "max_tokens 0), so the weights it serves can't be checked; use a server that gives them")  # fmt: skip
            found.append(np.array(nats[1:], np.float32))
        return found

    def generate(
        self, prompts: list[list[int]], *, n: int, max_new_tokens: int, temperature: float, seed: int, stop: list[int],
        share: tuple[int, int] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        """n completions of each prompt (token ids), ending at a `stop` token or after `max_new_tokens`. Each request has a
        seed of its own, a function of `seed` and its place; how reproducible that is, is the server's."""
        first = share[0] if share else 0

        def ask(i: int) -> list[Completion]:
            own = int.from_bytes(sha256(f"{seed}:{first + i}".encode()).digest()[:4]) >> 1
            choices = self._complete(prompts[i], n=n, max_tokens=max_new_tokens, temperature=temperature, seed=own,
                                     stop_token_ids=stop, skip_special_tokens=False, **self.never)  # fmt: skip
            return [self._completion(choice, stop) for choice in sorted(choices, key=lambda c: c["index"])]

        with ThreadPoolExecutor(self.options.concurrency) as pool:
            return list(pool.map(ask, range(len(prompts))))

    def _completion(self, choice: dict[str, Any], stop: list[int]) -> Completion:
        told = choice.get("logprobs") or {}
        nats, ids = told.get("token_logprobs") or [], choice.get("token_ids") or _numbered(told.get("tokens") or [])
        if not ids or len(nats) != len(ids):
            raise CuveeError(f"{self.options.url}: {len(nats)} log-probabilities and {len(ids)} token ids came back for a "
                             "completion; a server is needed that gives one of each a token (vLLM, SGLang, cuvee serve "
                             "--rollouts)")  # fmt: skip
        return Completion(ids, self.tokenizer.decode(ids[:-1] if ids[-1] in stop else ids), nats)

    def _complete(self, prompt: list[int], **fields: Any) -> list[dict[str, Any]]:
        body = {"model": self.options.model, "prompt": prompt, "logprobs": 1, "return_token_ids": True,
                "return_tokens_as_token_ids": True, "top_p": 1.0, **fields}  # fmt: skip
        url = f"{self.options.url}/completions"
        answer = self._post(url, body)
        if not isinstance(answer, dict) or "choices" not in answer:
            raise CuveeError(f"{url}: no completions came back but {str(answer)[:300]}; is engine_options.url the address of "
                             "OpenAI's completions API, up to /v1?")  # fmt: skip
        return answer["choices"]

    def _load(self, folder: Path) -> None:
        root = self.options.url.rstrip("/").removesuffix("/v1")
        if self.options.sync == "disk":
            self._post(f"{root}/update_weights_from_disk", {"model_path": str(folder.resolve())})
        else:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
            self._post(f"{root}/collective_rpc", reload)
            self._post(f"{root}/reset_prefix_cache", {})  # keys and values of the old weights

    def _vouch(self, path: Path, ctx: Context) -> None:
        """Raises CuveeError unless the server's log-probabilities are those of `path`."""
        from stages.rollout.engines import transformers

        local = transformers.Engine(path, Context(ctx.scratch))
        rng = np.random.default_rng(0)
        sequences = [rng.integers(0, len(self.tokenizer), 32).tolist() for _ in range(VOUCHED)]
        parity(self, sequences, local.logprobs(sequences), {})

    def _post(self, url: str, body: dict[str, Any]) -> Any:
        import httpx

        try:
            answer = self.client.post(url, json=body)
        except httpx.HTTPError as error:
            raise CuveeError(f"{url}: {error!r}; is the server up, and engine_options.url its address?") from None
        if answer.status_code != 200:
            key = answer.request.headers.get("authorization", "").rpartition(" ")[2]  # which some servers repeat
            told = answer.text.replace(key, "(the key)") if key else answer.text
            raise CuveeError(f"{url}: status {answer.status_code}: {told[:300]}")
        try:
            return answer.json() if answer.content else None
        except ValueError:
            return answer.text


def _numbered(tokens: list[str]) -> list[int]:
    """Ids of tokens in vLLM's form "token_id:5"; none where one has another."""
    numbers = [token.removeprefix("token_id:") for token in tokens if token.startswith("token_id:")]
    return [int(number) for number in numbers] if len(numbers) == len(tokens) else []
