"""Special tokens and chat templates. A template is a file beside this one; its name is its registration.

`command_a` has the bytes of Cohere's Command A (its renderer, github.com/cohere-ai/melody, `cmd3-v1`); `compact` keeps
its turn tokens and leaves out its preamble. Assistant text stands inside {% generation %}, the transformers extension
from which the loss mask is read, so that text and mask can't disagree.
"""

from __future__ import annotations

from pathlib import Path

# The order fixes the ids: 0..6 as in Cohere's tokenizers (PAD 0, UNK 1, BOS 5), then the tokens of a conversation.
SPECIAL_TOKENS: list[str] = [
    "<PAD>",
    "<UNK>",
    "<CLS>",
    "<SEP>",
    "<MASK_TOKEN>",
    "<BOS_TOKEN>",
    "<EOS_TOKEN>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|START_THINKING|>",
    "<|END_THINKING|>",
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|START_TOOL_RESULT|>",
    "<|END_TOOL_RESULT|>",
]
PAD, UNK, BOS, EOS = "<PAD>", "<UNK>", "<BOS_TOKEN>", "<EOS_TOKEN>"
END_OF_TURN = "<|END_OF_TURN_TOKEN|>"  # ends a chat completion: the `eos` of generation

TEMPLATE: dict[str, str] = {p.stem: p.read_text("utf-8") for p in sorted(Path(__file__).parent.glob("*.jinja"))}
