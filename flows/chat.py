"""Talk to a checkpoint in the terminal: `cuvee chat polished`. Also the text generator behind `cuvee serve`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from stages.stage import CuveeError, unknown

SAFETY = ("CONTEXTUAL", "STRICT", "NONE")
HELP = "/reset starts a new conversation, /safety CONTEXTUAL|STRICT|NONE sets the safety mode, /quit ends"


class Speaker:
    """A checkpoint folder that answers messages, token by token."""

    def __init__(self, folder: Path, engine: Any = None) -> None:
        """engine: a rollout engine of transformers, whose model this one then is."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from stages.model.inference import extend

        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if engine is None:
            model = extend(AutoModelForCausalLM.from_pretrained(folder, dtype="auto")).eval()
            model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.model = engine.model if engine else model
        self.stop = {self.tokenizer.eos_token_id}
        self.context = int(self.model.config.max_position_embeddings)

    def prompt(self, messages: list[dict[str, Any]], safety: str = "CONTEXTUAL", **variables: Any) -> list[int]:
        """The conversation as token ids, up to the assistant's turn. variables: what the chat template takes beside them
        (tools, documents). Raises CuveeError when it can't be rendered or leaves the model no room to answer."""
        from stages.chat.render import render

        ids = render(self.tokenizer, messages, generation=True, safety_mode=safety, **variables).ids
        if len(ids) >= self.context:
            raise CuveeError(
                f"the conversation has {len(ids)} tokens and the model reads {self.context}; start a new or shorter one"
            )
        return ids

    def reply(
        self, ids: list[int], *, max_new_tokens: int = 512, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
        top: int | None = None,
    ) -> Reply:  # fmt: skip
        """The answer to the prompt `ids`. temperature 0 takes the likeliest token; otherwise a token is drawn from the
        smallest set that holds `top_p` of the probability. top: the reply also tells log-probabilities, and so many of the
        likeliest tokens."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        room = min(max_new_tokens, self.context - len(ids))
        return Reply(self, ids, room, lambda logits: _choose(logits, temperature, top_p, generator), top)


class Reply:
    """Pieces of text, made while it is iterated. Then `finish` says why it ended ("stop" at the end of the turn,
    "length" at the limit of tokens), `tokens` how many were made and `raw` their text, special tokens shown. With `top`, `told` has of each token made
    (id, nats, [(id, nats) of the likeliest]), at temperature 1; whoever reads it may empty it."""

    def __init__(
        self, speaker: Speaker, ids: list[int], room: int, choose: Callable[[Any], int], top: int | None = None
    ) -> None:
        self.speaker, self.ids, self.room, self.choose, self.top = speaker, ids, room, choose, top
        self.finish, self.tokens, self.raw = "length", 0, ""
        self.told: list[tuple[int, float, list[tuple[int, float]]]] = []

    def __iter__(self) -> Iterator[str]:
        tokenizer, new, shown = self.speaker.tokenizer, [], ""
        for token in self._tokens():
            new.append(token)
            text = tokenizer.decode(new, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # half a character: wait for its other bytes
                yield text[len(shown) :]
                shown = text
        self.raw = tokenizer.decode(new)
        yield tokenizer.decode(new, skip_special_tokens=True)[len(shown) :]

    def _tokens(self) -> Iterator[int]:
        import torch

        model, known = self.speaker.model, len(self.speaker.tokenizer)  # the vocabulary's padding rows have no text
        step, cache = self.ids, None
        while self.tokens < self.room:
            with torch.inference_mode():
                ids = torch.tensor([step], device=model.device)
                out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits, cache = out.logits[0, -1].float().cpu(), out.past_key_values
            token = self.choose(logits[:known])
            self.tokens += 1
            if self.top is not None:
                nats = logits.log_softmax(-1)[:known]
                best = nats.topk(min(self.top, known))
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                self.told.append((token, float(nats[token]), list(pairs)))
            if token in self.speaker.stop:
                self.finish = "stop"
                return
            yield token
            step = [token]


def _choose(logits: Any, temperature: float, top_p: float, generator: Any) -> int:
    """A token of logits [vocab]."""
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = (logits / temperature).softmax(-1).sort(descending=True)
    values[values.cumsum(-1) - values >= top_p] = 0.0
    return int(tokens[values.multinomial(1, generator=generator)])


def chat(
    folder: Path,
    system: str = "",
    safety: str = "CONTEXTUAL",
    temperature: float = 0.0,
    max_new_tokens: int = 512,
    source: TextIO | None = None,
    sink: TextIO | None = None,
) -> int:
    """Converse until /quit or the end of the input. Returns the exit status 0.

    Raises CuveeError for a safety mode that is none. A message that can't be answered prints a sentence and goes on.
    """
    source, sink = source or sys.stdin, sink or sys.stdout
    _safety(safety)
    speaker, messages = Speaker(folder), _begin(system)
    interactive = source.isatty()
    if interactive:
        print(HELP, file=sink)
    while True:
        if interactive:
            print("\n> ", end="", file=sink, flush=True)
        try:
            line = source.readline()
        except KeyboardInterrupt:
            line = ""
        text = line.strip()
        if not line or text == "/quit":
            return 0
        try:
            if text == "/reset":
                messages = _begin(system)
            elif text.startswith("/safety"):
                safety = _safety(text.removeprefix("/safety").strip().upper())
            elif text.startswith("/"):
                print(HELP, file=sink)
            elif text:
                asked = [*messages, {"role": "user", "content": text}]
                ids = speaker.prompt(asked, safety)
                answer = _say(speaker.reply(ids, temperature=temperature, max_new_tokens=max_new_tokens), sink)
                messages = [*asked, {"role": "assistant", "content": answer}]
        except CuveeError as error:
            print(error, file=sink)


def _say(pieces: Iterable[str], sink: TextIO) -> str:
    answer = ""
    try:
        for piece in pieces:
            answer += piece
            print(piece, end="", file=sink, flush=True)
    except KeyboardInterrupt:  # enough of this answer, not of the conversation
        pass
    print(file=sink, flush=True)
    return answer


def _begin(system: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _safety(mode: str) -> str:
    if mode not in SAFETY:
        raise CuveeError(f"safety mode {unknown(mode, list(SAFETY))}")
    return mode
