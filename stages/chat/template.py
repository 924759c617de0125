"""Special tokens and chat templates. A template is a file beside this one; its name is its registration.

`command_a` has the bytes of Cohere's Command A (its renderer, github.com/cohere-ai/melody, `cmd3-v1`); `compact` keeps
its turn tokens and leaves out its preamble; `chatml` is Qwen's. Assistant text stands inside {% generation %}, the
transformers extension from which the loss mask is read, so that text and mask can't disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Special:
    """The special tokens of a tokenizer: `tokens` in the order of their ids, from 0, and the ones with a part to play.
    `end_of_turn` ends a chat completion: the tokenizer's `eos_token`."""

    tokens: tuple[str, ...]
    pad: str
    unk: str
    bos: str
    end_of_turn: str


PAD, UNK, BOS = "<PAD>", "<UNK>", "<BOS_TOKEN>"
END_OF_TURN = "<|END_OF_TURN_TOKEN|>"
# 0..6 as in Cohere's tokenizers (PAD 0, UNK 1, BOS 5), then the tokens of a conversation.
SPECIAL_TOKENS: list[str] = [
    PAD, UNK, "<CLS>", "<SEP>", "<MASK_TOKEN>", BOS, "<EOS_TOKEN>",
    "<|START_OF_TURN_TOKEN|>", END_OF_TURN, "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",
    "<|START_THINKING|>", "<|END_THINKING|>", "<|START_ACTION|>", "<|END_ACTION|>",
    "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>",
]  # fmt: skip
COMMAND = Special(tuple(SPECIAL_TOKENS), PAD, UNK, BOS, END_OF_TURN)
# Qwen's; <|endoftext|> stands between documents, which makes it our BOS too.
CHATML = Special(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), *["<|endoftext|>"] * 3, "<|im_end|>")

TEMPLATE: dict[str, str] = {p.stem: p.read_text("utf-8") for p in sorted(Path(__file__).parent.glob("*.jinja"))}


def special(template: str) -> Special:
    """The special tokens that the template called `template` writes."""
    return CHATML if template == "chatml" else COMMAND
