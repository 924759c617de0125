"""The keys of config.json that all families share, and what no family builds."""

from typing import Any

from stages.model.config import LLAMA3, ModelConfig
from stages.stage import ConfigError, names, resolve, unknown

# Keys that change transformers' logits, with the one value that is built; a file may leave them out.
BUILT = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
# Fields behind keys that every config.json has.
SHARED = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The keys that do not depend on the family. RoPE stands twice: as transformers 5 writes it (`rope_parameters`)
    and as transformers 4 and the converters that follow it read it (`rope_theta`, `rope_scaling`)."""
    scaling = {}
    if config.rope_scaling:
        length = int(config.rope_scaling["original_max_position_embeddings"])
        scaling = config.rope_scaling | {"original_max_position_embeddings": length, "rope_type": "llama3"}
    found = {hf: getattr(config, ours) for ours, hf in SHARED.items()} | {
        "attention_dropout": 0.0,
        "dtype": "float32",
        "hidden_act": "silu",
        "initializer_range": config.init_std,
        "model_type": config.family,
        "num_key_value_heads": config.num_query_groups,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"} | scaling,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
    }
    if scaling:
        found["rope_scaling"] = scaling
    if config.mup_base_width:  # logit_scale of the file includes the output multiplier
        found["mup"] = {"base_width": config.mup_base_width, "logit_scale": config.logit_scale}
    return found


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Raises ConfigError for another family or what changes the logits and is not built, KeyError for a missing key."""
    family = hf.get("model_type")
    if family not in names("model/families"):
        raise ConfigError(f"config.json: model_type: {unknown(str(family), names('model/families'))}")
    for key, built in BUILT.items():
        if hf.get(key, built) not in (built, None):
            raise ConfigError(f"config.json: {key} is {hf[key]!r}, but only {built!r} is built; take another model")
    mup, heads = hf.get("mup") or {}, hf["num_attention_heads"]
    config = ModelConfig(
        family=family,
        **{ours: hf[theirs] for ours, theirs in SHARED.items()},
        num_query_groups=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        init_std=float(hf.get("initializer_range", 0.02)),
        **_rope(hf),
        **resolve("model/families", family).from_hf(hf),
    )
    if mup:
        config.mup_base_width, written = mup["base_width"], config.logit_scale
        config.logit_scale = mup["logit_scale"]
        if config.output_scale != written:
            raise ConfigError(
                f"config.json: logit_scale is {written}, but {mup} gives {config.output_scale}; make them agree"
            )
    kinds = hf.get("layer_types")
    if kinds is not None and kinds != layer_types(config):
        raise ConfigError(
            f"config.json: layer_types {kinds} is not what {family} builds: full attention on every n-th layer, a "
            "window on the others; take another model"
        )
    config.check("config.json")
    return config


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling, wherever this version of transformers put them."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if kind not in ("default", "llama3") or partial not in (None, 1, 1.0):
        raise ConfigError(
            f"config.json: rope_type is {kind!r} with partial_rotary_factor {partial}, but only 'default' and 'llama3' "
            "of the whole head are built; take another model"
        )
    missing = [key for key in LLAMA3 if kind == "llama3" and key not in rope]
    if missing:
        raise ConfigError(f"config.json: rope_scaling has no {', '.join(missing)}, which rope_type 'llama3' needs")
    return {
        "rope_theta": float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
        "rope_scaling": {key: float(rope[key]) for key in LLAMA3} if kind == "llama3" else {},
    }


def layer_types(config: ModelConfig) -> list[str]:
    """transformers' name of each layer's attention."""
    return ["full_attention" if config.full_attention(i) else "sliding_attention" for i in range(config.num_layers)]


def pattern_of(kinds: list[str] | None, otherwise: int) -> int:
    """The number of the first layer of full attention, from 1; `otherwise` where there is none."""
    return kinds.index("full_attention") + 1 if kinds and "full_attention" in kinds else otherwise


def only(config: ModelConfig, where: str, **built: Any) -> None:
    """Raises ConfigError for a field whose value this family does not have."""
    for name, value in built.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"{where}.{name}: {getattr(config, name)}, but the family {config.family} has only {value}; "
                "set that or choose another family"
            )


def without_logit_scale(config: ModelConfig, where: str) -> None:
    """Raises ConfigError where a family without a factor on its logits would need one."""
    only(config, where, logit_scale=1.0)
    if config.mup_base_width and config.tie_embeddings:
        raise ConfigError(
            f"{where}.mup_base_width: {config.mup_base_width} with tied embeddings needs a factor on the logits, which "
            f"{config.family} does not have; set tie_embeddings to false or mup_base_width to 0"
        )
