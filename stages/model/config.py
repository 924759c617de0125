"""The sizes of a model, and the two-way mapping to Hugging Face's config.json. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from stages.stage import ConfigError, option


@dataclass
class ModelConfig:
    """A Cohere2 decoder: parallel attention + MLP blocks on one bias-free LayerNorm, tied embeddings, no biases.

    The defaults are Command R7B's. Every `sliding_window_pattern`-th layer attends to the whole document and
    has no positional encoding; the others attend to `sliding_window` tokens with RoPE.
    """

    num_layers: int = option(32, "blocks")
    hidden_size: int = option(4096, "width of the residual stream")
    ffn_hidden_size: int = option(14336, "width of the SwiGLU MLP (three matrices)")
    num_attention_heads: int = option(32, "query heads")
    num_query_groups: int = option(8, "key/value heads; query heads share them in equal groups")
    head_dim: int = option(128, "width of one head; hidden_size / num_attention_heads in this architecture")
    vocab_size: int = option(256000, "rows of the embedding, padding included")
    sliding_window: int = option(4096, "tokens a sliding-window layer sees, the current one included")
    sliding_window_pattern: int = option(4, "every n-th layer is full attention without positions")
    rope_theta: float = option(50000.0, "base of the rotary frequencies")
    logit_scale: float = option(0.25, "factor on the output logits")
    norm_epsilon: float = option(1e-5, "added to the variance inside LayerNorm")
    init_std: float = option(0.02, "standard deviation of the initial weights")
    max_position_embeddings: int = option(8192, "longest sequence in tokens")

    def check(self, where: str = "model") -> None:
        """Raises ConfigError for sizes that cannot be built together; `where` is put before the field's name."""
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
        for name in ("num_layers", "vocab_size", "sliding_window", "sliding_window_pattern", "ffn_hidden_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{where}.{name}: {getattr(self, name)} is not a positive number; give at least 1")

    def full_attention(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) sees the whole document and has no positional encoding."""
        return (layer + 1) % self.sliding_window_pattern == 0

    def parameters(self) -> int:
        """Trainable parameters: V·h + L·(2·h·q·d + 2·h·kv·d + 3·h·ffn + h) + h, embeddings counted once (tied)."""
        h, d = self.hidden_size, self.head_dim
        attention = 2 * h * d * (self.num_attention_heads + self.num_query_groups)
        return self.vocab_size * h + self.num_layers * (attention + 3 * h * self.ffn_hidden_size + h) + h

    def to_hf(self) -> dict[str, Any]:
        """config.json of transformers' Cohere2ForCausalLM, without the tokenizer's token ids."""
        kinds = ["full_attention" if self.full_attention(i) else "sliding_attention" for i in range(self.num_layers)]
        return {
            "architectures": ["Cohere2ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": "float32",
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.init_std,
            "intermediate_size": self.ffn_hidden_size,
            "layer_norm_eps": self.norm_epsilon,
            "layer_types": kinds,
            "logit_scale": self.logit_scale,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "cohere2",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_query_groups,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "sliding_window": self.sliding_window,
            "sliding_window_pattern": self.sliding_window_pattern,
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "ModelConfig":
        """The sizes behind a config.json. Raises ConfigError for another architecture or one we do not build."""
        if hf.get("model_type") != "cohere2":
            raise ConfigError(f"config.json: model_type is {hf.get('model_type')!r}, expected 'cohere2'")
        kinds = hf.get("layer_types")
        pattern = hf.get("sliding_window_pattern")
        if pattern is None:
            pattern = kinds.index("full_attention") + 1 if kinds and "full_attention" in kinds else 4
        rope = hf.get("rope_parameters") or {}
        heads = hf["num_attention_heads"]
        config = cls(
            num_layers=hf["num_hidden_layers"],
            hidden_size=hf["hidden_size"],
            ffn_hidden_size=hf["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            vocab_size=hf["vocab_size"],
            sliding_window=hf["sliding_window"],
            sliding_window_pattern=pattern,
            rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
            logit_scale=float(hf["logit_scale"]),
            norm_epsilon=float(hf["layer_norm_eps"]),
            init_std=float(hf["initializer_range"]),
            max_position_embeddings=hf["max_position_embeddings"],
        )
        if kinds is not None and kinds != config.to_hf()["layer_types"]:
            raise ConfigError(f"config.json: layer_types is not full attention on every {pattern}th layer: {kinds}")
        if rope.get("rope_type", "default") != "default":
            raise ConfigError(f"config.json: rope_type is {rope['rope_type']!r}, expected 'default'")
        if hf.get("attention_bias") or not hf.get("tie_word_embeddings", True):
            raise ConfigError("config.json: attention_bias or untied embeddings, which this architecture does not have")
        config.check("config.json")
        return config
