"""Rollouts through a transformers model: prefill once a prompt, then our own sampling loop over its forward pass.

`generate()` prefills every one of a prompt's n samples, concatenates its cache each step and waits for the longest
sample; here the prompt's cache is shared out, lies in one preallocated buffer, and finished rows leave the batch.
Masks are given per kind of layer, so that a step costs little besides the arithmetic.

That is for CPUs, in FP32. A GPU computes in BF16 with continuous batching in fixed shapes: see _slots.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, CacheLayerMixin

from stages.model.cuda import free_memory
from stages.model.inference import extend, extended, take_rows
from stages.rollout.engines._engine import Completion, differences
from stages.rollout.engines._slots import Slots, choose, output_logits
from stages.stage import Context, CuveeError

ROWS = {"cpu": 128, "cuda": 1024}  # sequences decoded together at most; more is no faster
LOGITS = 1 << 27  # of a step on a GPU at most, so that their FP32 copies stay within 2 GiB
MEMORY = 0.3  # share of a GPU's free memory that the slots' keys and values may have
PREFILL_TOKENS = {"cpu": 16384, "cuda": 262144}  # prompt tokens of a batch at most, padding included
THRESHOLD = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # nats: FP32 on both sides differs by about 1e-5; in BF16 logits
# of 30 are known to 0.1

REMOTE = False  # every process has an engine of its own


class Engine:
    """A model that writes. `path`: a CHECKPOINT folder; `state`: weights to use instead of the folder's; `options`: none,
    other engines have some."""

    def __init__(
        self,
        path: Path,
        ctx: Context,
        state: dict[str, torch.Tensor] | None = None,
        options: dict[str, Any] | None = None,
    ):
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        dtype = torch.bfloat16 if ctx.device == "cuda" else torch.float32
        if state is None:
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        else:
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
        extend(self.model).to(ctx.device).eval().requires_grad_(False)
        # Qwen v1's options decide on the host what a rotary embedding is.
        self.fixed_shapes = ctx.device == "cuda" and not extended(self.model.config)
        self.slots: Slots | None = None
        if state is not None:
            self.sync_weights(state)

    def sync_weights(self, state: dict[str, torch.Tensor]) -> None:
        """Take over weights by their Hugging Face names. Raises CuveeError, and takes none, unless every tensor arrives in its
        shape, and no other."""
        own, tied = self.model.state_dict(), {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        missing = sorted(own.keys() - state.keys() - tied)
        other = sorted(name for name, tensor in state.items() if name not in own or own[name].shape != tensor.shape)
        if missing or other:
            raise CuveeError(
                f"sync_weights: tensors missing {missing}, unknown or of another shape {other}; the trainer and the rollout "
                "engine must hold the same architecture"
            )
        self.model.load_state_dict(state, strict=False)

    @property
    def threshold(self) -> float:
        """Nats by which log-probabilities may differ from a trainer's."""
        return THRESHOLD[self.model.dtype]

    def differences(self, state: dict[str, torch.Tensor]) -> dict[str, float]:
        """Tensor group -> largest difference of its weights from `state`, for those that differ."""
        return differences(self.model.state_dict(), state)

    @torch.inference_mode()
    def logprobs(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """Of each sequence of T tokens, float32 [T-1]: log p(token t | tokens before), t = 1..T-1, nats."""
        found = []
        for tokens in sequences:  # one by one: a probe is short, and no padding can blur it
            ids = torch.tensor([tokens], device=self.model.device)
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
            nats = output_logits(self.model, hidden).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            found.append(nats.cpu().numpy())
        return found

    def generate(
        self, prompts: list[list[int]], *, n: int, max_new_tokens: int, temperature: float, seed: int, stop: list[int],
        share: tuple[int, int] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        """n completions of each prompt (token ids), ending at a `stop` token or after `max_new_tokens`.

        temperature 0 takes the likeliest token. Each row consumes random numbers of its own, a function of `seed` and
        its place (prompt, sample), not of how rows are batched. share: (first, all) where `prompts` are those from the
        first on of `all` prompts, which others sample.
        """
        first, count = share or (0, len(prompts))
        uniform = torch.rand(count, n, max_new_tokens, generator=torch.Generator().manual_seed(seed))
        uniform = uniform[first : first + len(prompts)]
        if self.fixed_shapes:
            rows = self._slots(prompts, n, max_new_tokens, temperature, stop)(prompts, n, uniform.flatten(0, 1))
            return [[self._completion(*row, stop) for row in rows[i * n : i * n + n]] for i in range(len(prompts))]
        found: list[list[Completion]] = [[] for _ in prompts]
        for batch in _batches(prompts, n, self.model.device.type):
            u = uniform[batch].flatten(0, 1).to(self.model.device)
            rows = self._batch([prompts[i] for i in batch], n, u, temperature, stop)
            for row, (ids, logprobs) in enumerate(rows):
                found[batch[row // n]].append(self._completion(ids, logprobs, stop))
        return found

    def _completion(self, ids: list[int], logprobs: list[float], stop: list[int]) -> Completion:
        return Completion(ids, self.tokenizer.decode(ids[:-1] if ids[-1] in stop else ids), logprobs)

    def _slots(self, prompts: list[list[int]], n: int, new: int, temperature: float, stop: list[int]) -> Slots:
        """Slots for such a call: those of the call before, if they serve it."""
        windows, capacity = self._windows(), max(map(len, prompts)) + new
        rows = min(ROWS["cuda"], -(-len(prompts) * n // 16) * 16, max(1, LOGITS // self.model.config.vocab_size))
        if self.model.device.type == "cuda":
            rows = max(1, min(rows, int(MEMORY * free_memory()) // Slots.row_bytes(self.model, windows, capacity)))
        if self.slots is None or not self.slots.fits(capacity, rows, new, stop):
            self.slots = None  # its memory first
            capacity = -(-capacity // 256) * 256  # so that a somewhat longer prompt needs no new graphs
            self.slots = Slots(self.model, windows=windows, vocabulary=len(self.tokenizer), rows=rows,
                               capacity=capacity, new=new, stop=stop)  # fmt: skip
        self.slots.temperature = temperature
        return self.slots

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
            token, logprob = choose(logits, uniform[live, step], temperature, len(self.tokenizer))
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
