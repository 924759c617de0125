"""Conversations to token ids and loss mask, in one pass over one template: training and inference use the same bytes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby, pairwise
from operator import itemgetter
from typing import Any

from stages.chat.template import CHATML, COMMAND, END_OF_TURN
from stages.stage import CuveeError

VARIABLES = ("tools", "documents", "safety_mode", "reasoning", "citations", "response_format")  # what a row may carry
TURNS = ("all", "last")  # assistant turns that are trained on
SPECIAL = re.compile("|".join(map(re.escape, (*COMMAND.tokens, *CHATML.tokens))))
_ENDS = re.compile("|".join(map(re.escape, (END_OF_TURN, "<|END_RESPONSE|>", *CHATML.tokens))))


class MaskError(CuveeError):
    """A conversation of which every token, or none, would be trained on."""


@dataclass
class Rendered:
    """`ids` and `mask` of equal length T; mask 1 where the token is the assistant's, its end of turn included."""

    ids: list[int]
    mask: list[int]


def render(
    tokenizer: Any, messages: list[dict], *, generation: bool = False, turns: str = "all", **variables: Any
) -> Rendered:
    """The conversation as `tokenizer.apply_chat_template` writes it, with the loss mask.

    Assistant turns are tokenised apart, as they are when sampled: where ChatML's "assistant\\n" precedes an answer that
    begins with white space, the tokens differ from those of the whole text in one piece.
    generation: end after the opening of the assistant's turn; such a prompt has no targets of its own, the mask is 0.
    turns: "all" trains on every assistant turn, "last" on the last one alone.
    variables: what the template takes besides messages, see VARIABLES; tools are JSON schemas in Hugging Face's form, or
    Python functions with type hints and a docstring.
    Raises CuveeError when a text holds a special token of the tokenizer (it could forge a turn) and when the template
    refuses the messages; MaskError, without `generation`, when nothing or everything is masked.
    """
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if forged := _special(tokenizer).search(json.dumps([messages, variables], ensure_ascii=False, default=str)):
        raise CuveeError(f"messages: the text holds the special token {forged[0]}, which only the chat template may write; "
                         f"remove it from the text")  # fmt: skip
    try:
        texts, spans = render_jinja_template(
            [messages], chat_template=tokenizer.get_chat_template(), add_generation_prompt=generation,
            return_assistant_tokens_mask=True, **tokenizer.special_tokens_map, **variables,
        )  # fmt: skip
    except (TemplateError, TypeError) as error:
        raise CuveeError(f"messages: the chat template refuses them: {error}") from None
    cuts = [0, *chain(*spans[0]), len(texts[0])]
    texts = [texts[0][a:b] for a, b in pairwise(cuts)]
    pieces = [one.ids for one in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    last = len(pieces) - 2 if turns == "last" else 1
    mask = [int(number % 2 == 1 and number >= last) for number, piece in enumerate(pieces) for _ in piece]
    ids = [*chain(*pieces)]
    if generation:
        return Rendered(ids, [0] * len(ids))
    if not any(mask) or all(mask):
        state = "every" if any(mask) else "no"
        raise MaskError(f"messages: {state} token would be trained on (roles {[m['role'] for m in messages]}); "
                        f"a conversation to train on needs a user turn and an assistant turn")  # fmt: skip
    return Rendered(ids, mask)


def render_row(
    tokenizer: Any, row: dict[str, Any], answer: str | None = None, *, generation: bool = False, turns: str = "all"
) -> Rendered:
    """`render` of a row of PROMPTS or CONVERSATIONS, with what it has of VARIABLES, and `answer` as the assistant's next
    turn: where that is the row's own answer and it has a `reply` (a turn that calls tools), the reply. Errors begin with the
    row's id."""
    own = row.get("reply") if answer == row.get("answer") else None
    messages = (
        row["messages"] if answer is None else [*row["messages"], own or {"role": "assistant", "content": answer}]
    )
    variables = {name: row[name] for name in VARIABLES if row.get(name) is not None}
    try:
        return render(tokenizer, messages, generation=generation, turns=turns, **variables)
    except CuveeError as error:
        raise type(error)(f"{row['id']}: {error}" if "id" in row else str(error)) from None


@lru_cache(8)
def _special(tokenizer: Any) -> re.Pattern:
    """Any special token of the tokenizer."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(names | set(tokenizer.all_special_tokens)))) or r"(?!)")


def preview(tokenizer: Any, rendered: Rendered) -> str:
    """The conversation as text with the trained spans in [[ ]], for a human eye."""
    spans = [(trained, tokenizer.decode([token for token, _ in span]))
             for trained, span in groupby(zip(rendered.ids, rendered.mask, strict=True), key=itemgetter(1))]  # fmt: skip
    return "".join(f"[[{text}]]" if trained else text for trained, text in spans)


def response(completion: str) -> str:
    """What the user would read of a raw completion: the response part, without markers, up to the end of the turn. Of a turn
    that calls tools all is kept: its thinking, then the calls."""
    turn = completion.split(END_OF_TURN, 1)[0]
    if "<|START_RESPONSE|>" in turn:
        completion = completion.split("<|START_RESPONSE|>", 1)[1]
    elif "<|END_THINKING|>" in turn and "<|START_ACTION|>" not in turn:
        completion = completion.split("<|END_THINKING|>", 1)[1]
    elif "<|START_THINKING|>" in turn and "<|START_ACTION|>" not in turn:
        return ""  # cut off while it thought
    return SPECIAL.sub("", _ENDS.split(completion, maxsplit=1)[0]).strip()
