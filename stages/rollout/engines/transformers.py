"""Rollouts through a transformers model: prefill once a prompt, then our own sampling loop over its forward pass.

`generate()` prefills every one of a prompt's n samples, concatenates its cache each step and waits for the longest
sample; here the prompt's cache is shared out, lies in one preallocated buffer, and finished rows leave the batch.
Masks are given per kind of layer, so that a step costs little besides the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, CacheLayerMixin

from stages.model.inference import extend, take_rows
from stages.stage import Context, CuveeError

ROWS = {"cpu": 128, "cuda": 1024}  # sequences decoded together at most; more is no faster
PREFILL_TOKENS = {"cpu": 16384, "cuda": 262144}  # prompt tokens of a batch at most, padding included
PROBE_THRESHOLD = 1e-3  # nats; FP32 on both sides differs by about 1e-5


@dataclass
class Completion:
    """ids: the sampled tokens, the stop token included if it came. text: the same without it, special tokens shown.
    logprobs: nats of each id under the model (temperature 1), as the trainer would compute them."""

    ids: list[int]
    text: str
    logprobs: list[float]


class Engine:
    """A model that writes. `path`: a CHECKPOINT folder; `state`: weights to use instead of the folder's."""

    def __init__(self, path: Path, ctx: Context, state: dict[str, torch.Tensor] | None = None):
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        if state is None:
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        else:
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
        extend(self.model).to(ctx.device).eval().requires_grad_(False)
        if state is not None:
            self.sync_weights(state)

    def sync_weights(self, state: dict[str, torch.Tensor]) -> None:
        """Take over weights by their Hugging Face names. Raises CuveeError unless every tensor arrives, and no other."""
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        found = self.model.load_state_dict(state, strict=False)
        missing = sorted(set(found.missing_keys) - tied)
        if missing or found.unexpected_keys:
            raise CuveeError(
                f"sync_weights: tensors missing {missing}, unknown {sorted(found.unexpected_keys)}; the trainer and "
                f"the rollout engine must hold the same architecture"
            )

    @torch.inference_mode()
    def logprobs(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """Of each sequence of T tokens, float32 [T-1]: log p(token t | tokens before), t = 1..T-1, nats."""
        found = []
        for tokens in sequences:  # one by one: a probe is short, and no padding can blur it
            ids = torch.tensor([tokens], device=self.model.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
            found.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu().numpy())
        return found

    def generate(
        self, prompts: list[list[int]], *, n: int, max_new_tokens: int, temperature: float, seed: int, stop: list[int]
    ) -> list[list[Completion]]:
        """n completions of each prompt (token ids), ending at a `stop` token or after `max_new_tokens`.

        temperature 0 takes the likeliest token. Each row consumes random numbers of its own, a function of `seed` and
        its place (prompt, sample), not of how rows are batched.
        """
        uniform = torch.rand(len(prompts), n, max_new_tokens, generator=torch.Generator().manual_seed(seed))
        found: list[list[Completion]] = [[] for _ in prompts]
        for batch in _batches(prompts, n, self.model.device.type):
            u = uniform[batch].flatten(0, 1).to(self.model.device)
            rows = self._batch([prompts[i] for i in batch], n, u, temperature, stop)
            for row, (ids, logprobs) in enumerate(rows):
                end = ids[:-1] if ids[-1] in stop else ids
                found[batch[row // n]].append(Completion(ids, self.tokenizer.decode(end), logprobs))
        return found

    @torch.inference_mode()
    def _batch(
        self, prompts: list[list[int]], n: int, uniform: torch.Tensor, temperature: float, stop: list[int]
    ) -> list[tuple[list[int], list[float]]]:
        """(ids, logprobs) of len(prompts) * n rows; `uniform` [rows, max_new_tokens] in [0, 1) draws the tokens."""
        device, new = self.model.device, uniform.shape[1]
        width, rows = max(map(len, prompts)), len(prompts) * n
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        position = (real.cumsum(1) - 1).clamp(min=0)
        cache = Cache(layers=[_Layer(width + new, window) for window in self._windows()])
        logits = self.model(ids, attention_mask=real, position_ids=position, past_key_values=cache, logits_to_keep=1)
        logits = logits.logits[:, -1].repeat_interleave(n, 0)
        cache.batch_repeat_interleave(n)
        take_rows(self.model, torch.arange(len(prompts), device=device).repeat_interleave(n))
        visible = torch.ones(rows, 1, 1, width + new, dtype=torch.bool, device=device)
        visible[:, 0, 0, :width] = real.bool().repeat_interleave(n, 0)
        position = position[:, -1:].repeat_interleave(n, 0)
        stops, live = torch.tensor(stop, device=device), torch.arange(rows, device=device)
        done = torch.zeros(rows, dtype=torch.bool, device=device)
        tokens, logprobs, lengths = torch.zeros(rows, new, dtype=torch.long), torch.zeros(rows, new), [new] * rows
        for step in range(new):
            token, logprob = self._sample(logits, uniform[live, step], temperature)
            at = live.cpu()
            tokens[at, step], logprobs[at, step] = token.cpu(), logprob.cpu()
            ended = torch.isin(token, stops) & ~done
            for row in live[ended].tolist():
                lengths[row] = step + 1
            done |= ended
            left = int((~done).sum())
            if left == 0 or step == new - 1:
                break
            if left <= 0.75 * len(live):  # copying the cache costs about as much as one step
                keep = (~done).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                take_rows(self.model, keep)
                live, visible, position, token = live[keep], visible[keep], position[keep], token[keep]
                done = done[keep]
            position = position + 1
            logits = self._step(token[:, None], visible, width + step + 1, position, cache)
        return [(tokens[r, :length].tolist(), logprobs[r, :length].tolist()) for r, length in enumerate(lengths)]

    def _step(self, token, visible, end: int, position, cache) -> torch.Tensor:
        """Logits [rows, vocab] after one more token [rows, 1]; `end`: columns of the cache in use, this token's too."""
        window = getattr(self.model.config, "sliding_window", None) or end
        masks = {
            "full_attention": visible[..., :end],
            "sliding_attention": visible[..., max(0, end - window) : end],
        }
        if not getattr(self.model.config, "layer_types", None):  # such models take one mask
            masks = masks["full_attention"]
        return self.model(token, attention_mask=masks, position_ids=position, past_key_values=cache).logits[:, -1]

    def _sample(self, logits, uniform, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their log-probabilities at temperature 1, both [rows]. Padding rows of the vocabulary, for which
        the tokenizer has no text, are never chosen."""
        logprobs = logits.float().log_softmax(-1)
        known = logprobs[:, : len(self.tokenizer)]
        if temperature == 0:
            token = known.argmax(-1)
        else:
            weights = (known if temperature == 1 else (known / temperature).log_softmax(-1)).exp()
            cumulative = weights.cumsum(-1)
            token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
            token = token.clamp(max=known.shape[1] - 1)
        return token, logprobs.gather(1, token[:, None])[:, 0]

    def _windows(self) -> list[int]:
        """Of each layer, the tokens it sees, 0 = all."""
        config = self.model.config
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        return [config.sliding_window if kind == "sliding_attention" else 0 for kind in kinds]


class _Layer(CacheLayerMixin):
    """Keys and values of one layer in a buffer of `capacity` columns; `window` > 0 shows only what the layer sees."""

    def __init__(self, capacity: int, window: int):
        super().__init__()
        self.capacity, self.window, self.length = capacity, window, 0

    def lazy_initialization(self, key_states, value_states) -> None:
        batch, heads, _, dim = key_states.shape
        self.keys = key_states.new_empty(batch, heads, self.capacity, dim)
        self.values = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        first = max(0, start + 1 - self.window) if self.window else 0
        return self.keys[:, :, first : self.length], self.values[:, :, first : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.capacity

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats > 1:
            self.keys, self.values = self.keys.repeat_interleave(repeats, 0), self.values.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]


def _batches(prompts: list[list[int]], n: int, device: str) -> list[list[int]]:
    """Prompts of like length together: lists of indices, each within ROWS and PREFILL_TOKENS (or a single prompt)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)):
        size = len(batches[-1]) + 1 if batches else 0
        longest = len(prompts[batches[-1][0]]) if batches else 0
        if batches and size * n <= ROWS[device] and size * longest <= PREFILL_TOKENS[device]:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def parity(engine: Engine, trainer: Any, sequences: list[list[int]], threshold: float = PROBE_THRESHOLD) -> float:
    """Largest difference in nats between the engine's and the trainer's log-probabilities of `sequences`.

    trainer: has `logprobs(groups)` and `hf_state()`. Raises CuveeError above `threshold`, naming the tensor group whose
    weights differ most.
    """
    from stages.trainer.batch import Sequence

    groups = [[Sequence(np.array(s, np.int32), np.ones(len(s), np.float32))] for s in sequences]
    gaps = [ours - theirs for ours, theirs in zip(engine.logprobs(sequences), trainer.logprobs(groups), strict=True)]
    worst = float(np.abs(np.concatenate(gaps)).max())
    if not worst <= threshold:  # NaN fails too
        raise CuveeError(
            f"rollout engine: its log-probabilities differ from the trainer's by {worst:.3g} nats (allowed {threshold:g})"
            f" after sync_weights; {_blame(engine, trainer.hf_state())}"
        )
    return worst


def _blame(engine: Engine, state: dict[str, torch.Tensor]) -> str:
    ours = engine.model.state_dict()
    groups: dict[str, float] = {}
    for name, tensor in state.items():
        group = name.removeprefix("model.").rsplit(".", 2 if ".layers." in name and "norm" not in name else 1)[0]
        gap = float((ours[name].cpu().float() - tensor.cpu().float()).abs().nan_to_num(nan=torch.inf).max())
        groups[group] = max(groups.get(group, 0.0), gap)
    worst = max(groups, key=lambda g: groups[g])
    if groups[worst] == 0:
        return "all weights are equal, so the two forward passes disagree: check the model configuration of either side"
    return f"the tensor group {worst} differs most (by {groups[worst]:.3g}); the weights were corrupted on the way"
