"""The sizes of a model, whatever its family. Imports no torch.

A family is one file, `stages/model/families/<name>.py`, called as Hugging Face's `model_type`. It defines

    TRAITS: Traits                    what all its models have in common
    check(config, where) -> None      raises ConfigError for what this family does not have
    to_hf(config) -> dict             its keys of config.json, besides those that all families share
    from_hf(hf) -> dict               the ModelConfig fields behind those keys; raises ConfigError
    table(config, head) -> list[Row]  every parameter with its Hugging Face tensors (most take families/_table.py's)
"""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from stages.model import mup
from stages.stage import ConfigError, option, resolve

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Traits:
    """What every model of a family has in common."""

    parallel_block: bool  # x + attention(n) + mlp(n) on one norm, or the two in turn with a norm each
    norm: str  # "layernorm" (without bias) or "rmsnorm"
    rotary_everywhere: bool  # or on sliding-window layers only
    interleaved_rope: bool  # Hugging Face's rotary pairs are (2i, 2i + 1), or (i, i + head_dim / 2)
    qkv_bias: bool  # on Q, K and V only


@dataclass
class ModelConfig:
    """A decoder with grouped queries, SwiGLU and RoPE. The defaults are Command R7B's.

    Every `sliding_window_pattern`-th layer attends to the whole document; the others to `sliding_window` tokens.
    """

    family: str = option("cohere2", "architecture", "model/families")
    num_layers: int = option(32, "blocks")
    hidden_size: int = option(4096, "width of the residual stream")
    ffn_hidden_size: int = option(14336, "width of the SwiGLU MLP (three matrices)")
    num_attention_heads: int = option(32, "query heads")
    num_query_groups: int = option(8, "key/value heads; query heads share them in equal groups")
    head_dim: int = option(128, "width of one head; hidden_size / num_attention_heads in these architectures")
    vocab_size: int = option(256000, "rows of the embedding, padding included")
    tie_embeddings: bool = option(True, "whether the output layer is the embedding")
    sliding_window: int = option(4096, "tokens a sliding-window layer sees, the current one included; 0 = all, always")
    sliding_window_pattern: int = option(4, "every n-th layer is full attention (in cohere2 without positions)")
    rope_theta: float = option(50000.0, "base of the rotary frequencies")
    rope_scaling: dict[str, float] = option(
        {}, "Llama 3.1's factor, low_freq_factor, high_freq_factor, original_max_position_embeddings; empty = none"
    )
    logit_scale: float = option(0.25, "factor on the output logits")
    norm_epsilon: float = option(1e-5, "added to the variance inside the norms")
    init_std: float = option(0.02, "standard deviation of the initial weights")
    max_position_embeddings: int = option(8192, "longest sequence in tokens")
    mup_base_width: int = option(
        0, "hidden_size at which lr and init_std were tuned (muP, stages/model/mup.py); 0 = off"
    )
    dynamic_ntk: bool = option(False, "Qwen v1: larger rotary base at inference beyond trained_length")
    logn_attention: bool = option(False, "Qwen v1: larger queries at inference beyond trained_length")
    trained_length: int = option(0, "tokens of a training sequence, for the two above; 0 = max_position_embeddings")

    def check(self, where: str = "model") -> None:
        """Raises ConfigError for sizes that cannot be built together; `where` is put before the field's name."""
        least = dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                               "vocab_size", "sliding_window_pattern", "max_position_embeddings"), 1)  # fmt: skip
        least |= dict.fromkeys(("sliding_window", "mup_base_width", "trained_length", "init_std", "norm_epsilon"), 0)
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ConfigError(f"{where}.{name}: {getattr(self, name)} is too small; give at least {low}")
        for name in ("rope_theta", "logit_scale"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{where}.{name}: {getattr(self, name)} is not positive; give more than 0")
        if self.hidden_size != self.num_attention_heads * self.head_dim:
            raise ConfigError(
                f"{where}.head_dim: {self.head_dim}, but hidden_size {self.hidden_size} / num_attention_heads "
                f"{self.num_attention_heads} is {self.hidden_size / self.num_attention_heads:g}; make them agree"
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"{where}.num_query_groups: {self.num_query_groups} does not divide num_attention_heads "
                f"{self.num_attention_heads}; choose a divisor"
            )
        if self.head_dim % 2:
            raise ConfigError(f"{where}.head_dim: {self.head_dim} is odd; rotary pairs need an even number")
        if self.rope_scaling and self.rope_scaling.keys() != set(LLAMA3):
            raise ConfigError(
                f"{where}.rope_scaling: {self.rope_scaling} should be empty or have exactly {', '.join(LLAMA3)}"
            )
        self._family.check(self, where)

    @property
    def traits(self) -> Traits:
        return self._family.TRAITS

    @property
    def _family(self) -> ModuleType:
        return resolve("model/families", self.family)

    @property
    def output_scale(self) -> float:
        """The factor on the logits of this width: logit_scale, and with tied embeddings muP's output multiplier."""
        return self.logit_scale * mup.output_multiplier(self)

    def full_attention(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) sees the whole document."""
        return self.sliding_window == 0 or (layer + 1) % self.sliding_window_pattern == 0

    def rotary(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) rotates queries and keys."""
        return self.traits.rotary_everywhere or not self.full_attention(layer)

    def parameters(self) -> int:
        """Trainable parameters, tied embeddings counted once: the sum over the table of weights."""
        return sum(math.prod(shape) for row in self._family.table(self) for shape in row.hf.values())

    def to_hf(self) -> dict[str, Any]:
        """config.json of transformers, without the tokenizer's token ids."""
        from stages.model.families import _common

        return _common.to_hf(self) | self._family.to_hf(self)

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "ModelConfig":
        """The sizes behind a config.json. Raises ConfigError for another architecture or one we do not build."""
        from stages.model.families import _common

        return _common.from_hf(hf)
