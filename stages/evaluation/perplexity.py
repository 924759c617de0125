"""Loss on held-out text, in nats a token and in bits a byte of text (which compares models of different tokenizers)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.model.inference import extended
from stages.stage import CuveeError


def byte_lengths(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """Bytes of text behind each token id, int64 [vocab_size]; 0 for special tokens and unused rows.

    A byte-level token is written with one character a byte. Raises CuveeError for another kind of tokenizer.
    """
    decoder = str(tokenizer.backend_tokenizer.decoder)
    if "ByteLevel" not in decoder:
        raise CuveeError(f"the tokenizer decodes with {decoder[:40]}; bits a byte need a byte-level tokenizer")
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    found = np.zeros(vocab_size, np.int64)
    for token, i in tokenizer.get_vocab().items():
        found[i] = 0 if i in special else len(token)
    return found


def windows(prefix: Path, limit: int, length: int) -> list[np.ndarray]:
    """The first `limit` tokens of an indexed file, as pieces of at most `length` tokens that stay inside a document."""
    from stages.data.indexed import IndexedTokens

    documents, found, left = IndexedTokens(prefix), [], limit
    for i in range(len(documents)):
        if left <= 0:
            break
        tokens = documents.document(i)[:left]
        left -= len(tokens)
        found += [tokens[start : start + length] for start in range(0, len(tokens), length)]
    return [piece for piece in found if len(piece) > 1]


@torch.inference_mode()
def measure(model: Any, pieces: list[np.ndarray], bytes_of: np.ndarray, batch_tokens: int) -> dict[str, float]:
    """Negative log-likelihood of each piece's tokens but its first.

    Returns nats_per_token, perplexity (its exponential), bits_per_byte, and the tokens and bytes that were scored.
    """
    nats, tokens, size = 0.0, 0, 0
    for batch in _batches(pieces, batch_tokens):
        width = max(map(len, batch))
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        valid = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, piece in enumerate(batch):  # padding on the right: a causal model's tokens never see it
            ids[row, : len(piece)] = torch.from_numpy(piece.astype(np.int64))
            valid[row, : len(piece)] = True
        ids, valid = ids.to(model.device), valid.to(model.device)
        scored = valid[:, 1:]
        options = {"position_ids": valid.cumsum(1) - 1} if extended(model.config) else {}  # the end of each piece
        logits = model(input_ids=ids, use_cache=False, **options).logits[:, :-1][scored].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][scored], reduction="none")
        nats += float(loss.double().sum())
        tokens += len(loss)
        size += int(sum(bytes_of[piece[1:]].sum() for piece in batch))
    mean = nats / max(tokens, 1)
    return {
        "nats_per_token": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": nats / math.log(2) / max(size, 1),
        "tokens": tokens,
        "bytes": size,
    }


def _batches(pieces: list[np.ndarray], batch_tokens: int) -> Iterator[list[np.ndarray]]:
    """Pieces of like length together, at most `batch_tokens` with padding (a longer piece is a batch alone)."""
    batch: list[np.ndarray] = []
    for piece in sorted(pieces, key=len):
        if batch and len(piece) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch
