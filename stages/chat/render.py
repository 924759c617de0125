"""Conversations to token ids and loss mask, in one pass over one template: training and inference use the same bytes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from stages.chat.template import END_OF_TURN, SPECIAL_TOKENS
from stages.stage import CuveeError

_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))


@dataclass
class Rendered:
    """`ids` and `mask` of equal length T; mask 1 where the token is the assistant's, its end of turn included."""

    ids: list[int]
    mask: list[int]


def render(tokenizer: Any, messages: list[dict], *, generation: bool = False, **variables: Any) -> Rendered:
    """The conversation as `tokenizer.apply_chat_template` writes it, with the loss mask.

    generation: end after the opening of the assistant's turn; such a prompt has no targets of its own, the mask is 0.
    variables: what the template takes besides messages (tools, documents, safety_mode, ...).
    Raises CuveeError when a text holds a special token (it could forge a turn), when the template refuses the
    messages, and, without `generation`, when nothing or everything is masked.
    """
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    forged = _SPECIAL.search(json.dumps([messages, variables], ensure_ascii=False, default=str))
    if forged:
        raise CuveeError(f"messages: the text holds the special token {forged[0]}, which only the chat template may write; "
                         f"remove it from the text")  # fmt: skip
    try:
        texts, spans = render_jinja_template(
            [messages], chat_template=tokenizer.get_chat_template(), add_generation_prompt=generation,
            return_assistant_tokens_mask=True, **tokenizer.special_tokens_map, **variables,
        )  # fmt: skip
    except TemplateError as error:
        raise CuveeError(f"messages: {error.message}") from None
    found = tokenizer(texts[0], add_special_tokens=False, return_offsets_mapping=True)
    ids, mask = found["input_ids"], _mask(found["offset_mapping"], spans[0])
    if generation:
        return Rendered(ids, [0] * len(ids))
    if not any(mask) or all(mask):
        state = "every" if any(mask) else "no"
        raise CuveeError(f"messages: {state} token would be trained on (roles {[m['role'] for m in messages]}); "
                         f"a conversation to train on needs a user turn and an assistant turn")  # fmt: skip
    return Rendered(ids, mask)


def _mask(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """1 for the tokens inside the spans of characters. (transformers' own mask ends at a span that opens with a space.)"""
    mask, token = [0] * len(offsets), 0
    for start, end in spans:
        while offsets[token][1] <= start:
            token += 1
        while token < len(offsets) and offsets[token][0] < end:
            mask[token] = 1
            token += 1
    return mask


def preview(tokenizer: Any, rendered: Rendered) -> str:
    """The conversation as text with the trained spans in [[ ]], for a human eye."""
    text, inside = "", 0
    for token, trained in zip(rendered.ids, rendered.mask, strict=True):
        text += ("[[" if trained else "]]") if trained != inside else ""
        text, inside = text + tokenizer.decode([token]), trained
    return text + ("]]" if inside else "")


def response(completion: str) -> str:
    """What the user would read of a raw completion: the response part, without markers, up to the end of the turn."""
    completion = completion.split(END_OF_TURN, 1)[0]
    if "<|START_RESPONSE|>" in completion:
        completion = completion.split("<|START_RESPONSE|>", 1)[1]
    return _SPECIAL.sub("", completion.split("<|END_RESPONSE|>", 1)[0]).strip()
