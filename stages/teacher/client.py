"""A client of OpenAI-compatible chat endpoints, for models that write or judge training data: a vendor's, a serving
engine's, or a model of one's own behind `cuvee serve`.

Answers are kept on disk by their request, so that nothing is asked or paid for twice. What passes by itself (timeouts,
429, 5xx) is tried again with growing pauses, or after as long as the server says (Retry-After).
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from stages.chat.messages import Refused, message, openai, said
from stages.stage import ConfigError, Context, CuveeError, option, parse, placement, unknown
from stages.store.record import write_atomic

AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses that another attempt may not meet
LONGEST_PAUSE = 60.0  # seconds between two attempts, where the server does not ask for more
PATIENCE = 600.0  # seconds a server may ask to wait for
BYTES_PER_TOKEN = 4  # of prompts, where no server has counted: for dry runs and rate limits
MILLION = 1_000_000


@dataclass
class Teacher:
    """A model behind an endpoint. What decides its answers is part of the artifact's address; the rest is not."""

    model: str = option("", "the name by which the server knows the model")
    temperature: float = option(1.0, "of sampling")
    top_p: float = option(1.0, "smallest set of tokens of this probability is sampled from")
    max_tokens: int = option(1024, "longest answer in tokens")
    extra: dict[str, Any] = option({}, "more fields of the request's body; null leaves one out, e.g. seed")
    url: str = placement("", "address of the API up to /v1, e.g. http://127.0.0.1:8000/v1")
    key: str = placement("", "name of the environment variable with the key; empty sends none")
    input_price: float = placement(0.0, "price of a million prompt tokens")
    output_price: float = placement(0.0, "price of a million answered tokens")
    requests_per_minute: float = placement(0.0, "limit of requests; 0 = none")
    tokens_per_minute: float = placement(0.0, "limit of prompt and answer tokens; 0 = none")
    concurrency: int = placement(8, "requests under way at once")
    timeout: float = placement(120.0, "seconds that an answer may take")
    attempts: int = placement(6, "times that a request is tried")


def teachers(values: dict[str, Any], where: str) -> dict[str, Teacher]:
    """Teachers by name from plain values. Raises ConfigError naming `where`.name.field."""
    for name, own in values.items():
        if not isinstance(own, dict):
            raise ConfigError(
                f"{where}.{name}: {own!r} is no teacher; give its fields, e.g. {{model: m, url: http://127.0.0.1:8000/v1}}"
            )
    found = {name: parse(Teacher, own, f"{where}.{name}") for name, own in values.items()}
    for name, teacher in found.items():
        if not teacher.model or not teacher.url.startswith(("http://", "https://")):
            raise ConfigError(f"{where}.{name}: model is {teacher.model!r}, url {teacher.url!r}; give the model's name and an "
                              "address such as http://127.0.0.1:8000/v1")  # fmt: skip
        for own in ("max_tokens", "concurrency", "attempts", "timeout"):
            if getattr(teacher, own) <= 0:
                raise ConfigError(f"{where}.{name}.{own}: {getattr(teacher, own)} is not positive; give more than 0")
    return found


@dataclass
class Request:
    """One answer asked for. options: fields of the body that differ from the teacher's."""

    teacher: str
    messages: list[dict[str, Any]]
    seed: int = 0
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Completion:
    """message: the assistant's, in the neutral schema; None where it says nothing or a call can't be read. finish: why it
    ended, "stop" for a whole answer."""

    message: dict[str, Any] | None
    finish: str

    @property
    def text(self) -> str:
        """What it says, and the calls it makes as JSON."""
        return said(self.message) if self.message else ""


@dataclass
class Usage:
    """requests that a server answered (or, of a dry run, would be sent), answers from the cache, attempts that failed, tokens,
    and their price."""

    requests: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def add(self, teacher: Teacher, prompt_tokens: int, completion_tokens: int) -> None:
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.cost += (prompt_tokens * teacher.input_price + completion_tokens * teacher.output_price) / MILLION


class Client:
    """Asks `teachers` by name. cache: folder of the answers. budget: most to spend, in the prices' currency; 0 = no limit.
    clock: a module or object with time's `monotonic` and `sleep`; transport: httpx's, both for tests."""

    def __init__(
        self, teachers: dict[str, Teacher], cache: Path, *, budget: float = 0.0, log: Callable[[str], None] = print,
        clock: Any = time, transport: Any = None,
    ):  # fmt: skip
        import httpx

        self.teachers, self.cache, self.budget, self.log, self.clock = teachers, cache, budget, log, clock
        self.usage = {name: Usage() for name in teachers}
        self._paces = {name: _Pace(teacher, clock) for name, teacher in teachers.items()}
        self._lock = threading.Lock()
        self._http = httpx.Client(transport=transport)

    def complete(self, requests: list[Request]) -> list[Completion]:
        """The answers, in order. Raises CuveeError for a request that a server refuses, that fails too often, or that the
        budget no longer allows; what was answered before is kept for the next time."""
        files = [self._file(*self._body(request)) for request in requests]
        pools = {name: ThreadPoolExecutor(t.concurrency, f"teacher-{name}") for name, t in self.teachers.items()}
        try:
            waiting: dict[Path, Future[Completion]] = {}
            for file, request in zip(files, requests, strict=True):
                if file not in waiting:
                    waiting[file] = pools[request.teacher].submit(self._one, request)
            return [waiting[file].result() for file in files]
        finally:
            for pool in pools.values():
                pool.shutdown(cancel_futures=True)

    def dry(self, requests: list[Request]) -> dict[str, Usage]:
        """What `complete` would use at most, by teacher, with nothing sent: prompts by their bytes, answers as long as allowed."""
        found = {name: Usage() for name in self.teachers}
        for request in requests:
            teacher, body = self._body(request)
            if self._file(teacher, body).exists():
                found[request.teacher].cached += 1
            else:
                found[request.teacher].add(teacher, _prompt_tokens(body), _longest(body))
        return found

    def _body(self, request: Request) -> tuple[Teacher, dict[str, Any]]:
        if request.teacher not in self.teachers:
            raise CuveeError(f"teacher: {unknown(request.teacher, sorted(self.teachers))}")
        teacher = self.teachers[request.teacher]
        body = {"model": teacher.model, "messages": [openai(m) for m in request.messages], "max_tokens": teacher.max_tokens,
                "temperature": teacher.temperature, "top_p": teacher.top_p, "seed": request.seed, "tools": request.tools,
                **request.options, **teacher.extra}  # fmt: skip
        return teacher, {name: value for name, value in body.items() if value is not None}

    def _file(self, teacher: Teacher, body: dict[str, Any]) -> Path:
        key = sha256(json.dumps([teacher.url, body], sort_keys=True).encode()).hexdigest()
        return self.cache / key[:2] / f"{key}.json"

    def _one(self, request: Request) -> Completion:
        teacher, body = self._body(request)
        file, usage = self._file(teacher, body), self.usage[request.teacher]
        if file.exists():
            answer = json.loads(file.read_text("utf-8"))
            with self._lock:
                usage.cached += 1
        else:
            answer = self._ask(request.teacher, teacher, body)
            write_atomic(file, json.dumps(answer).encode())
            told = answer["usage"] or {}
            with self._lock:
                usage.add(teacher, told.get("prompt_tokens") or _prompt_tokens(body),
                          told.get("completion_tokens") or len(json.dumps(answer["message"])) // BYTES_PER_TOKEN)  # fmt: skip
        return _completion(answer)

    def _ask(self, name: str, teacher: Teacher, body: dict[str, Any]) -> dict[str, Any]:
        """message, finish and usage of one answer."""
        pace, where = self._paces[name], f"teacher {name} at {teacher.url}"
        for attempt in range(teacher.attempts):
            if self.budget and (spent := sum(u.cost for u in self.usage.values())) >= self.budget:
                raise CuveeError(
                    f"budget: {spent:.4g} of {self.budget:.4g} is spent; what was answered is kept, raise it to go on"
                )
            pace.wait(_prompt_tokens(body) + _longest(body))
            answer, problem, after = self._post(where, teacher, body)
            if answer:
                return answer
            with self._lock:
                self.usage[name].retries += 1
            if attempt == 1:
                self.log(f"{where}: {problem}; trying on")
            pause = min(LONGEST_PAUSE, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
            if after > PATIENCE:
                raise CuveeError(
                    f"{where} asks to wait {after:.0f} s ({problem}); run again later, what was answered is kept"
                )
            if after:
                pace.hold(after)  # everyone's limit, not this request's
            elif attempt + 1 < teacher.attempts:
                self.clock.sleep(pause)
        raise CuveeError(
            f"{where} failed {teacher.attempts} times, at last with {problem}; see that it runs, or raise attempts"
        )

    def _post(self, where: str, teacher: Teacher, body: dict[str, Any]) -> tuple[dict[str, Any] | None, str, float]:
        """(answer, "", 0), or (None, what was wrong, seconds that the server asks to wait). Raises CuveeError where another
        attempt would be refused too."""
        import httpx

        headers = {"Authorization": f"Bearer {_key(where, teacher)}"} if teacher.key else {}
        try:
            response = self._http.post(
                f"{teacher.url.rstrip('/')}/chat/completions", json=body, headers=headers, timeout=teacher.timeout
            )
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise CuveeError(f"{where}: the url is wrong: {error}") from None
        except httpx.TransportError as error:
            return None, f"{type(error).__name__} ({error})", 0.0
        if response.status_code in AGAIN:
            return None, f"status {response.status_code} ({_told(response)})", _retry_after(response.headers)
        if response.status_code != 200:
            raise CuveeError(f"{where} refuses the request: status {response.status_code}, {_told(response)}")
        try:
            found = response.json()
            choice = found["choices"][0]
            return {"message": dict(choice["message"]), "finish": choice.get("finish_reason") or "stop",
                    "usage": found.get("usage")}, "", 0.0  # fmt: skip
        except (ValueError, KeyError, IndexError, TypeError) as error:
            return None, f"an answer without a completion ({type(error).__name__}: {error})", 0.0


class _Pace:
    """Starts of one teacher's requests, as far apart as its limits ask."""

    def __init__(self, teacher: Teacher, clock: Any):
        self.teacher, self.clock, self.free, self.lock = teacher, clock, 0.0, threading.Lock()

    def wait(self, tokens: int) -> None:
        """Until a request of so many tokens may start."""
        requests, volume = self.teacher.requests_per_minute, self.teacher.tokens_per_minute
        with self.lock:
            now = self.clock.monotonic()
            start = max(now, self.free)
            self.free = start + max(60 / requests if requests else 0.0, 60 * tokens / volume if volume else 0.0)
        if start > now:
            self.clock.sleep(start - now)

    def hold(self, seconds: float) -> None:
        """No request starts before so many seconds have passed."""
        with self.lock:
            self.free = max(self.free, self.clock.monotonic() + seconds)


def _key(where: str, teacher: Teacher) -> str:
    found = os.environ.get(teacher.key, "").strip()  # a secret read from a file ends in a line end
    if not found or not found.isascii() or not found.isprintable():
        state = "no header of HTTP can carry" if found else "is not set"
        raise CuveeError(
            f"{where}: the environment variable {teacher.key} (field key) {state}; export it with the API key"
        )
    return found


def _retry_after(headers: Any) -> float:
    """Seconds that a server asks to wait; 0 where it does not say."""
    told = headers.get("retry-after", "")
    try:
        return max(float(headers["retry-after-ms"]) / 1000 if "retry-after-ms" in headers else float(told or 0), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(told).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def _told(response: Any) -> str:
    """What the server says is wrong, one line."""
    try:
        found = response.json()
        found = found.get("error", found)
        text = found.get("message", found) if isinstance(found, dict) else found
    except (ValueError, AttributeError):
        text = response.text
    key = response.request.headers.get("authorization", "").rpartition(" ")[2]  # which some servers repeat
    text = str(text).replace(key, "(the key)") if key else str(text)
    return " ".join(text.split())[:200] or "no reason given"


def _completion(answer: dict[str, Any]) -> Completion:
    try:
        found = message(answer["message"] | {"role": "assistant", "content": answer["message"].get("content") or ""})
        return Completion(found if found["content"] or "tool_calls" in found else None, answer["finish"])
    except Refused:
        return Completion(None, answer["finish"])


def _prompt_tokens(body: dict[str, Any]) -> int:
    return len(json.dumps([body["messages"], body.get("tools")], ensure_ascii=False).encode()) // BYTES_PER_TOKEN + 1


def _longest(body: dict[str, Any]) -> int:
    return int(body.get("max_tokens") or body.get("max_completion_tokens") or 0)


def client_of(config: Any, found: dict[str, Teacher], requests: list[Request], stage: str, ctx: Context, more: str = "") -> Client:
    """The client of a stage with the options cache, budget and dry_run; the log says what `requests` would use at most.

    Raises CuveeError with that for a dry run. more: what the requests leave out.
    """
    cache = Path(config.cache).expanduser() if config.cache else ctx.scratch / "answers"
    client = Client(found, cache, budget=config.budget, log=ctx.log)
    most = totals(client.dry(requests))
    told = (f"{most['requests']:,} requests to {', '.join(found)} ({most['cached']:,} answers are kept already), about "
            f"{most['prompt_tokens']:,} prompt tokens, at most {most['completion_tokens']:,} of answers, at most "
            f"{most['cost']:.4g} in the prices' currency")  # fmt: skip
    if config.dry_run:
        raise CuveeError(f"{stage}.dry_run: {told}{more}; nothing was sent, set dry_run=false to send them")
    ctx.log(told)
    return client


def totals(usage: dict[str, Usage]) -> dict[str, float]:
    """The sum over all teachers, by field."""
    rows = [asdict(one) for one in usage.values()]
    return {name: sum(row[name] for row in rows) for name in asdict(Usage())}
