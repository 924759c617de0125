"""Small models on a GPU, in any precision, with the same weights."""

from __future__ import annotations

from dataclasses import replace

from stages.model.config import ModelConfig

COHERE2 = ModelConfig(
    num_layers=4, hidden_size=512, ffn_hidden_size=1024, num_attention_heads=4, num_query_groups=2, head_dim=128,
    vocab_size=2048, sliding_window=100, logit_scale=1.0, max_position_embeddings=1024,
)  # fmt: skip
FAMILIES = {
    "cohere2": COHERE2,
    "llama": replace(COHERE2, family="llama", sliding_window=0, rope_theta=1e4),
    "qwen2": replace(COHERE2, family="qwen2", sliding_window=0, rope_theta=1e4, tie_embeddings=False),
}


def build(sizes: ModelConfig, precision: str, seed: int = 0):
    """(model, its parameters' gradients after a backward pass, as a function)."""
    import torch

    from stages.model import megatron, weights
    from stages.model.model import Model
    from stages.trainer import parallel
    from stages.trainer.config import TrainConfig

    parallel.initialise(TrainConfig())
    model = Model(sizes, "lm", precision=precision if precision == "fp32" else "bf16").cuda()
    rows = weights.table(sizes)
    weights.load([model], rows, weights.Initial([replace(row, std=row.std or 0.5) for row in rows], seed))
    if precision != "fp32":
        megatron.set_precision(model.config, precision)
    for parameter in model.parameters():  # what Megatron-core's data parallel wrapper gives them
        parameter.main_grad = torch.zeros(parameter.shape, device="cuda")
        parameter.grad_added_to_main_grad = False

    def gradient():
        found = {}
        for name, parameter in model.named_parameters():
            own = parameter.grad if parameter.grad is not None and not parameter.grad_added_to_main_grad else 0
            found[name] = parameter.main_grad + own
        return found

    return model, gradient
