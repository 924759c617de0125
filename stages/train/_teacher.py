"""A teacher's likeliest tokens in every place of a batch, for the objective distill."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stages.merge.checkpoint import tokenizer_digests
from stages.model.inference import extend
from stages.stage import Context, CuveeError
from stages.trainer.batch import Group, Sequence

LOGITS = {"cpu": 1 << 24, "cuda": 1 << 29}  # of a forward pass at most, or one sequence's


class Teacher:
    """The CHECKPOINT folder `path`, whole on every rank. Raises CuveeError unless it has the tokenizer of `init`."""

    def __init__(self, path: Path, init: Path, k: int, ctx: Context):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if tokenizer_digests(path)["tokenizer"] != tokenizer_digests(init)["tokenizer"]:
            raise CuveeError(
                f"teacher: {path} has another tokenizer than the student {init}; give one trained with the same"
            )
        self.model = extend(AutoModelForCausalLM.from_pretrained(path, dtype="auto")).to(ctx.device).eval()
        self.known = len(AutoTokenizer.from_pretrained(path))  # rows above have no text
        self.k = min(k, self.known)

    def __call__(self, groups: list[Group], trainer: Any) -> list[Group]:
        """The groups with `Sequence.teacher`."""
        sequences = [s for group in groups for s in group]
        found: dict[int, Sequence] = {}
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].tokens))
        rows = max(1, LOGITS[self.model.device.type] // (self.known * len(sequences[order[-1]].tokens)))
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            for i, ids, nats in zip(batch, *self._likeliest([sequences[i].tokens for i in batch]), strict=True):
                length = len(sequences[i].tokens)
                found[i] = replace(sequences[i], teacher=(ids[:length], nats[:length]))
        rest = (found[i] for i in range(len(sequences)))
        return [[next(rest) for _ in group] for group in groups]

    @torch.inference_mode()
    def _likeliest(self, tokens: list[Any]) -> tuple[Any, Any]:
        """int32 and float32 [B, T, k]: of each place t the likeliest tokens after those before t (place 0: zeros)."""
        width, device = max(map(len, tokens)), self.model.device
        ids = torch.zeros(len(tokens), width, dtype=torch.long)
        for row, sequence in zip(ids, tokens, strict=True):  # causal: padding on the right cannot reach back
            row[: len(sequence)] = torch.as_tensor(sequence)
        logits = self.model(input_ids=ids.to(device), use_cache=False).logits[:, :-1, : self.known].float()
        nats, best = logits.log_softmax(-1).topk(self.k)
        place = lambda x: torch.nn.functional.pad(x, (0, 0, 1, 0)).cpu()  # noqa: E731
        return place(best.int()).numpy(), place(nats).numpy()
