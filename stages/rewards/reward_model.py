"""Score completions with a trained reward model: a scalar head on the last token's final-norm hidden state."""

from pathlib import Path
from typing import Any

from stages.stage import Context, CuveeError

BATCH_TOKENS = {"cpu": 8192, "cuda": 131072}  # tokens of a forward pass, padding included


class Scorer:
    """The REWARD_MODEL folder as a function of token sequences."""

    def __init__(self, path: Path, ctx: Context):
        import torch
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModel

        weights: dict[str, torch.Tensor] = {}
        for file in sorted(path.glob("*.safetensors")):
            weights |= load_file(file)
        if "score.weight" not in weights:
            raise CuveeError(
                f"{path}: no tensor score.weight in its safetensors; a reward model (train.reward) was expected"
            )
        self.head = weights.pop("score.weight")[0].to(ctx.device)
        self.model = AutoModel.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
        self.model.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
        self.model.to(ctx.device).eval()

    def __call__(self, sequences: list[list[int]]) -> list[float]:
        """The score of each sequence of token ids, at its last token. Batched by length, padded on the right."""
        import torch

        found = [0.0] * len(sequences)
        device = self.model.device
        for batch in self._batches(sequences, device.type):
            width = max(len(sequences[i]) for i in batch)
            ids = torch.tensor([sequences[i] + [0] * (width - len(sequences[i])) for i in batch], device=device)
            last = torch.tensor([len(sequences[i]) - 1 for i in batch], device=device)
            with torch.inference_mode():  # causal: what stands right of the last token cannot reach it, no mask needed
                hidden = self.model(input_ids=ids, use_cache=False).last_hidden_state
                scores = hidden[torch.arange(len(batch), device=device), last] @ self.head
            for i, score in zip(batch, scores.tolist(), strict=True):
                found[i] = score
        return found

    @staticmethod
    def _batches(sequences: list[list[int]], device: str) -> list[list[int]]:
        batches: list[list[int]] = []
        for i in sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i)):
            if batches and (len(batches[-1]) + 1) * len(sequences[batches[-1][0]]) <= BATCH_TOKENS[device]:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches


class Reward:
    """The reward model's score of each completion after its prompt, at its last token."""

    def __init__(self, ctx: Context, model: Path | None):
        from transformers import AutoTokenizer

        if model is None:
            raise CuveeError("rewards: reward_model needs the input `reward`, a trained reward model; none was given")
        self.scorer = Scorer(model, ctx)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.end = self.tokenizer.eos_token_id

    def __call__(
        self, prompts: list[dict[str, Any]], completions: list[list[str]], tokens: list[list[list[int]]] | None = None
    ) -> list[list[float]]:
        """Scores in the shape of `completions` (raw texts); unbounded, comparable within one prompt.

        tokens: the completions as they were sampled, the end of turn only where it came: what the model was trained on.
        Without them the texts are encoded, and each is ended.
        """
        from stages.chat.render import render_row

        encode = lambda text: [*self.tokenizer.encode(text, add_special_tokens=False), self.end]  # noqa: E731
        tokens = tokens or [[encode(text) for text in texts] for texts in completions]
        sequences = []
        for prompt, answers in zip(prompts, tokens, strict=True):
            ids = render_row(self.tokenizer, prompt, generation=True).ids
            sequences += [ids + answer for answer in answers]
        scores = iter(self.scorer(sequences))
        return [[next(scores) for _ in texts] for texts in completions]
