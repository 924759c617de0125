"""Continuous batching with fixed shapes: a decode step that a GPU replays as one CUDA graph.

Every sequence has a slot: a row of static buffers with its keys and values at their own places, from column 0. A step
reads one token in each slot, samples the next and writes both, whatever the slots hold, and decides nothing on the host;
every few steps the host looks which rows have ended and gives their slots to the prompts that wait. A prompt's last
token is read by the first step of its slot, so that sampling is in one place. Layers with a sliding window keep a ring
of as many columns: attention does not care for the order of keys that are rotated already.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

EVERY = 8  # steps between looks at which rows have ended; a look makes the GPU wait for the host
REFILL = 8  # 1 / share of the slots that must be free before a prefill: its launches cost as much as a few steps
GRAIN = 128  # columns of attention come in multiples of it, so that a few graphs serve all lengths
PREFILL_TOKENS = 65536  # prompt tokens of one forward pass at most, padding included
ATTENTION = "grouped"


def _grouped(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any):
    """SDPA that lets the query heads of a group share its keys, where there is one query: nothing is repeated."""
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows, heads, _, width = query.shape
    packed = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    out = F.scaled_dot_product_attention(packed, key, value, attention_mask, scale=options.get("scaling"))
    return out.reshape(rows, 1, heads, value.shape[3]), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _grouped)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class Slots:
    """`rows` slots for sequences of at most `capacity` tokens, `new` of them sampled; see `__call__`.

    model: a ...ForCausalLM. windows: of each layer, the tokens it sees, 0 = all. vocabulary: ids below it may be chosen.
    """

    def __init__(
        self, model: Any, *, windows: list[int], vocabulary: int, rows: int, capacity: int, new: int, stop: list[int],
    ):  # fmt: skip
        self.model, self.vocabulary, self.temperature = model, vocabulary, 1.0
        self.rows, self.capacity, self.new = rows, capacity, new
        model.set_attn_implementation(ATTENTION)
        _fuse_norms(model)
        config, device = model.config, model.device
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.windows = windows
        shapes = [(rows, heads, min(capacity, window or capacity), width) for window in windows]
        self.keys = [torch.zeros(shape, dtype=model.dtype, device=device) for shape in shapes]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        zeros = lambda *shape, dtype=torch.long: torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
        self.token, self.position, self.made = zeros(rows), zeros(rows), zeros(rows)
        self.done = ~zeros(rows, dtype=torch.bool)
        # What is sampled in rows that have ended goes to one column more.
        self.tokens, self.logprobs = zeros(rows, new + 1), zeros(rows, new + 1, dtype=torch.float32)
        self.uniform = zeros(rows, new + 1, dtype=torch.float32)
        self.columns = torch.arange(capacity, device=device)
        self.stop = torch.tensor(stop, dtype=torch.long, device=device)
        self.graphs: dict[tuple[int, int, float], Any] = {}  # by rows, columns and temperature
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @staticmethod
    def row_bytes(model: Any, windows: list[int], capacity: int) -> int:
        """Memory of one slot's keys and values."""
        config = model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        return sum(2 * heads * width * min(capacity, w or capacity) for w in windows) * model.dtype.itemsize

    def fits(self, capacity: int, rows: int, new: int, stop: list[int]) -> bool:
        """Whether these slots, and the graphs captured for them, serve such a call; at half as many rows still."""
        return (self.new, self.stop.tolist()) == (new, stop) and self.capacity >= capacity and 2 * self.rows >= rows

    @torch.inference_mode()
    def __call__(self, prompts: list[list[int]], n: int, uniform: Tensor) -> list[tuple[list[int], list[float]]]:
        """(ids, logprobs) of n samples of each prompt, in order; uniform: float32 [len(prompts) * n, new] in [0, 1) draws
        the tokens of each."""
        jobs = sorted(range(len(prompts) * n), key=lambda job: (-len(prompts[job // n]), job))
        waiting, held, reach = deque(jobs), {}, {}  # slot -> job, slot -> columns in use
        found: list[Any] = [None] * len(jobs)
        while waiting or held:
            free = [slot for slot in range(self.rows) if slot not in held]
            if waiting and (len(free) * REFILL >= self.rows or not held):
                taken = {slot: waiting.popleft() for slot in free[: len(waiting)]}
                self._fill(taken, prompts, n, uniform)
                held |= taken
                reach |= {slot: len(prompts[job // n]) for slot, job in taken.items()}
            rows = self._compact(held, reach, bool(waiting))
            columns = self._columns_for(max(reach.values()) + EVERY)
            for _ in range(EVERY):
                self._run(rows, columns)
            done = self.done[:rows].tolist()  # waits for the GPU
            ended = [slot for slot in held if done[slot]]
            for slot, row in zip(ended, self._read(ended), strict=True):
                found[held.pop(slot)] = row
                del reach[slot]
            reach = {slot: columns + EVERY for slot, columns in reach.items()}
        return found

    def _fill(self, taken: dict[int, int], prompts: list[list[int]], n: int, uniform: Tensor) -> None:
        """Put jobs into their slots, all but each prompt's last token read."""
        device = self.model.device
        slots, jobs = torch.tensor(list(taken), device=device), torch.tensor(list(taken.values()))
        numbers = [job // n for job in taken.values()]
        self.token[slots] = torch.tensor([prompts[i][-1] for i in numbers], device=device)
        self.position[slots] = torch.tensor([len(prompts[i]) - 1 for i in numbers], device=device)
        self.uniform[slots, : self.new] = uniform[jobs].to(device)
        self.made[slots], self.done[slots] = 0, False
        distinct = [i for i in dict.fromkeys(numbers) if len(prompts[i]) > 1]
        while distinct:
            count = max(1, PREFILL_TOKENS // len(prompts[distinct[0]]))  # the longest come first
            part, distinct = distinct[:count], distinct[count:]
            places = {number: at for at, number in enumerate(part)}
            pairs = [(slot, places[number]) for slot, number in zip(taken, numbers, strict=True) if number in places]
            self._prefill([prompts[i][:-1] for i in part], *torch.tensor(pairs, device=device).t())

    def _prefill(self, prompts: list[list[int]], slots: Tensor, source: Tensor) -> None:
        """Keys and values of `prompts`, longest first, into `slots`, each from the prompt at `source`."""
        device, longest = self.model.device, len(prompts[0])
        ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)  # padding is overwritten
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        cache = DynamicCache()
        self.model.base_model(ids, past_key_values=cache, use_cache=True)
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            width = keys.shape[2]
            for buffer, new in ((keys, layer.keys), (values, layer.values)):
                if longest > width:  # of each prompt the last `width` tokens, token t in column t % width
                    last = lengths[:, None] - 1
                    place = (last - (last - self.columns[:width]) % width).clamp(min=0)
                    new = new.gather(2, place[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))
                buffer[slots, :, : new.shape[2]] = new[source]

    def _compact(self, held: dict[int, int], reach: dict[int, int], waiting: bool) -> int:
        """The rows that the next steps compute: all that are held. When none waits for the others, they move together."""
        sizes = [self.rows]
        while sizes[-1] > 16:
            sizes.append(-(-sizes[-1] // 64) * 16)  # a quarter, in the sixteens that suit a GPU
        rows = min(size for size in sizes if size >= (max(held) + 1 if waiting else len(held)))
        beyond = sorted(slot for slot in held if slot >= rows)
        if beyond:
            free = [slot for slot in range(rows) if slot not in held][: len(beyond)]
            to, source = (torch.tensor(one, device=self.model.device) for one in (free, beyond))
            for buffer in (self.token, self.position, self.made, self.done, self.tokens, self.logprobs, self.uniform,
                           *self.keys, *self.values):  # fmt: skip
                buffer[to] = buffer[source]
            self.done[source] = True
            for new, old in zip(free, beyond, strict=True):
                held[new], reach[new] = held.pop(old), reach.pop(old)
        return rows

    def _columns_for(self, needed: int) -> int:
        """`needed` columns rounded up, to multiples that grow with it."""
        grain = max(GRAIN, 1 << max(needed.bit_length() - 3, 0))
        return min(self.capacity, -(-needed // grain) * grain)

    def _read(self, slots: list[int]) -> list[tuple[list[int], list[float]]]:
        if not slots:
            return []
        at = torch.tensor(slots, device=self.model.device)
        lengths = self.made[at].tolist()
        longest = max(lengths)
        tokens, logprobs = self.tokens[at, :longest].tolist(), self.logprobs[at, :longest].tolist()
        return [(t[:length], p[:length]) for t, p, length in zip(tokens, logprobs, lengths, strict=True)]

    def _run(self, rows: int, columns: int) -> None:
        """One step; on a GPU the second of its shape is recorded, and from then on replayed."""
        graph = self.graphs.get((rows, columns, self.temperature))
        if graph is not None:
            graph.replay()
            return
        self._step(rows, columns)
        if self.pool is not None:
            graph = torch.cuda.CUDAGraph()
            # A thread that writes a checkpoint meanwhile is none of the graph's business.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self._step(rows, columns)
            self.graphs[rows, columns, self.temperature] = graph

    def _step(self, rows: int, columns: int) -> None:
        """Read a token in each of the first `rows` slots and sample the next, looking at `columns` at most."""
        position, made, done = self.position[:rows], self.made[:rows], self.done[:rows]
        cache = Cache(layers=[_Slot(self, layer, rows, columns) for layer in range(len(self.keys))])
        hidden = self.model.base_model(
            self.token[:rows, None], attention_mask=self._masks(position, columns), position_ids=position[:, None],
            past_key_values=cache, use_cache=True,
        ).last_hidden_state[:, 0]  # fmt: skip
        place = torch.where(done, self.new, made)[:, None]
        token, logprob = choose(
            output_logits(self.model, hidden),
            self.uniform[:rows].gather(1, place)[:, 0],
            self.temperature,
            self.vocabulary,
        )
        self.tokens[:rows].scatter_(1, place, token[:, None])
        self.logprobs[:rows].scatter_(1, place, logprob[:, None])
        made += ~done
        done |= (token[:, None] == self.stop).any(1) | (made >= self.new)
        position += ~done
        self.token[:rows] = torch.where(done, self.token[:rows], token)

    def _masks(self, position: Tensor, columns: int) -> Any:
        """What each row sees of its columns, to be added to the attention's scores, per kind of layer."""

        def mask(width: int) -> Tensor:  # a full ring shows all of its columns
            seen = self.columns[:width] <= position[:, None]
            zero = torch.zeros((), dtype=self.model.dtype, device=position.device)
            return torch.where(seen, zero, -torch.inf)[:, None, None]

        if not getattr(self.model.config, "layer_types", None):  # such models take one mask
            return mask(columns)
        window = max(self.windows)
        return {"full_attention": mask(columns), "sliding_attention": mask(min(columns, window) if window else columns)}


class _Slot(CacheLayerMixin):
    """One layer's keys and values of the first `rows` slots, as a model's forward pass writes and sees them."""

    def __init__(self, slots: Slots, layer: int, rows: int, columns: int):
        super().__init__()
        self.keys, self.values = slots.keys[layer][:rows], slots.values[layer][:rows]
        width = self.keys.shape[2]
        self.at, self.seen = (slots.position[:rows] % width)[:, None, None, None], min(columns, width)
        self.is_initialized = True

    def lazy_initialization(self, *args: Any) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        at = self.at.expand_as(key_states)
        self.keys.scatter_(2, at, key_states)
        self.values.scatter_(2, at, value_states)
        return self.keys[:, :, : self.seen], self.values[:, :, : self.seen]

    def get_seq_length(self) -> int:
        return self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen, 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length


def output_logits(model: Any, hidden: Tensor) -> Tensor:
    """float32 [rows, vocab] of hidden states [rows, h]; on a GPU products of BF16 leave as the FP32 they are summed in."""
    weight = model.lm_head.weight
    if hidden.device.type == "cuda" and hidden.dtype == torch.bfloat16:
        out = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        out = F.linear(hidden, weight).float()
    return out * (getattr(model, "logit_scale", None) or 1.0)


def choose(logits: Tensor, uniform: Tensor, temperature: float, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probabilities at temperature 1, both [rows]. Padding rows of the vocabulary, for which the
    tokenizer has no text, are never chosen. uniform: [rows] in [0, 1)."""
    logprobs = logits.float().log_softmax(-1)
    known = logprobs[:, :vocabulary]
    if temperature == 0:
        token = known.argmax(-1)
    else:
        weights = (known if temperature == 1 else (known / temperature).log_softmax(-1)).exp()
        cumulative = weights.cumsum(-1)
        token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
        token = token.clamp(max=known.shape[1] - 1)
    return token, logprobs.gather(1, token[:, None])[:, 0]


def _fuse_norms(model: nn.Module) -> None:
    """Norms in one kernel each: transformers spells them out in a dozen, and a step of few tokens costs by the kernel."""
    for module in model.modules():
        kind, epsilon = type(module).__name__, getattr(module, "variance_epsilon", None)
        if epsilon is None or module.weight.dim() != 1:
            continue
        if kind.endswith("RMSNorm"):
            module.forward = _rms_norm(module.weight, epsilon)
        elif kind.endswith("LayerNorm"):
            module.forward = _layer_norm(module.weight, epsilon)


def _rms_norm(weight: Tensor, epsilon: float) -> Any:
    return lambda x: F.rms_norm(x, weight.shape, weight, epsilon)


def _layer_norm(weight: Tensor, epsilon: float) -> Any:
    return lambda x: F.layer_norm(x, weight.shape, weight, None, epsilon)
