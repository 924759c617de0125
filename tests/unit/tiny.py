"""Tiny models, tokenizers and artifacts for the tests of merge, evaluation, export, report and chat."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.chat.template import SPECIAL_TOKENS, TEMPLATE
from stages.stage import Artifact, Context, Kind


def tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer without merges: 20 special tokens, then the 256 bytes; the compact chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(SPECIAL_TOKENS)
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<BOS_TOKEN>", eos_token="<|END_OF_TURN_TOKEN|>", pad_token="<PAD>",
        unk_token="<UNK>", chat_template=TEMPLATE["compact"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def checkpoint(folder: Path, seed: int = 0, spread: float = 1.0, **sizes) -> Path:
    """A random Cohere2 checkpoint: 2 layers (1 sliding window of 8, 1 full), hidden 16, 276 rows of vocabulary."""
    import torch
    from transformers import Cohere2Config, Cohere2ForCausalLM, GenerationConfig

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "sliding_window_pattern": 2, "sliding_window": 8} | sizes
    config = Cohere2Config(
        vocab_size=276, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, logit_scale=0.25,
        max_position_embeddings=512, bos_token_id=5, eos_token_id=8, initializer_range=0.3 * spread, **sizes,
    )  # fmt: skip
    model = Cohere2ForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=5, eos_token_id=8, pad_token_id=0)
    model.save_pretrained(folder)
    return tokenizer(folder)


def artifact(path: Path, kind: Kind, **record) -> Artifact:
    fingerprint = record.pop("fingerprint", path.name)
    return Artifact(path, kind, fingerprint, {"fingerprint": fingerprint, "kind": kind.value, "inputs": {}, **record})


def context(folder: Path) -> Context:
    folder.mkdir(exist_ok=True)
    return Context(scratch=folder)


def jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def hosting(application: Any) -> Iterator[str]:
    """Serve an ASGI application on a port of loopback that the system chooses; its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(application, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield "http://{}:{}".format(*server.servers[0].sockets[0].getsockname())
    finally:
        server.should_exit = True
        thread.join()
