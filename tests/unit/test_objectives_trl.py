"""Loss and gradient equal those of TRL's trainers, which compute them from the same log-probabilities.

TRL reads log-probabilities from a model and logs as it goes: the model and the trainer here are stand-ins that hand it
the numbers and swallow the log; the loss is TRL's own code.
"""

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from test_objectives import example, pack

from stages import stage

pytest.importorskip("trl")

CASES = [
    ("dpo", {}, {"loss_types": ["sigmoid"]}),
    ("dpo", {"beta": 0.5}, {"loss_types": ["sigmoid"], "beta": 0.5}),
    ("ipo", {}, {"loss_types": ["ipo"]}),
    ("ipo", {"beta": 0.7}, {"loss_types": ["ipo"], "beta": 0.7}),
    ("bradley_terry", {}, {"centring": None}),
    ("bradley_terry", {"centring": 0.01}, {"centring": 0.01}),
    ("kto", {}, {}),
    ("kto", {"beta": 0.3, "desirable_weight": 1.3}, {"beta": 0.3, "desirable_weight": 1.3}),
    ("grpo", {}, {"loss_type": "grpo"}),
    ("grpo", {"beta": 0.2, "clip_high": 0.5}, {"loss_type": "grpo", "beta": 0.2, "epsilon_high": 0.5}),
    ("dapo", {}, {"loss_type": "dapo", "beta": 0.0, "epsilon_high": 0.28}),
    ("rloo", {}, {}),
    ("rloo", {"beta": 0.2, "clip": 0.1}, {"beta": 0.2, "epsilon_low": 0.1, "epsilon_high": 0.1}),
]


def padded(sequences, key):
    """[B, T] float64, 0 where a sequence is shorter."""
    found = torch.zeros(len(sequences), max(len(s["logp"]) for s in sequences), dtype=torch.float64)
    for i, s in enumerate(sequences):
        found[i, : len(s["logp"])] = torch.tensor(s[key], dtype=torch.float64)
    return found


def model(logps):
    """What TRL calls for log-probabilities [B, T] of the tokens 1..T."""
    def give(**_):
        zeros = torch.zeros_like(logps)
        return SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    return give


def trainer(**attributes):
    same = lambda tensor, **_: tensor  # noqa: E731
    found = MagicMock(
        accelerator=SimpleNamespace(gather=same, gather_for_metrics=same, reduce=same, device="cpu", num_processes=1),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1, aux_loss_enabled=False,
        beta=0.1, epsilon_low=0.2, epsilon_high=0.2, precompute_ref_logps=False, current_gradient_accumulation_steps=1,
    )  # fmt: skip
    found.configure_mock(**attributes)
    return found


def inputs(sequences):
    """TRL's batch: one prompt token, then the completion."""
    mask = torch.nn.functional.pad(padded(sequences, "one"), (1, 0)).long()
    return {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}


def pairs(sequences, logps, options):
    from trl.trainer.dpo_trainer import DPOTrainer

    it = trainer(**{
        "loss_weights": [1.0], "ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False,
        "ref_model": model(padded(sequences, "ref")), **options,
    })  # fmt: skip
    return DPOTrainer._compute_loss(it, model(logps), inputs(sequences), False)


def rewards(sequences, scores, options):
    from trl.trainer.reward_trainer import RewardTrainer

    it = trainer(args=SimpleNamespace(center_rewards_coefficient=options["centring"]))
    margin = torch.tensor([s["margin"] for s in sequences[: len(sequences) // 2]], dtype=torch.float64)
    batch = {"margin": margin, "attention_mask": torch.ones(1)}
    return RewardTrainer.compute_loss(it, lambda **_: SimpleNamespace(logits=scores[:, None]), batch)


def unpaired(sequences, logps, options):
    """z comes from two tables of mismatched log-probabilities whose mean difference it is."""
    from trl.trainer.kto_trainer import KTOTrainer

    z = torch.full((len(sequences),), sequences[0]["baseline"], dtype=torch.float64)
    policy = model(logps)
    it = trainer(**{
        "loss_type": "kto", "calculate_KL": True, "desirable_weight": 1.0, "undesirable_weight": 1.0,
        "ref_model": model(padded(sequences, "ref")), **options,
    })  # fmt: skip
    it._compute_kl_logps = lambda asked, batch: z if asked is policy else torch.zeros_like(z)
    batch = inputs(sequences) | {"label": torch.tensor([s["reward"] > 0 for s in sequences])}
    return KTOTrainer._compute_loss(it, policy, batch, False)


def completions(sequences, logps, **more):
    zeros, mask = torch.zeros_like(logps), padded(sequences, "one")
    one = torch.ones(len(sequences), 1, dtype=torch.long)
    batch = {"prompt_ids": one, "prompt_mask": one, "completion_ids": mask.long(), "completion_mask": mask.long(), **more}
    return batch, lambda *_, **__: (logps, zeros, None)


def relative(sequences, logps, options):
    from trl.trainer.grpo_trainer import GRPOTrainer

    grouped = torch.tensor([s["reward"] for s in sequences], dtype=torch.float64).view(-1, 3)
    advantages = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    old = {"old_per_token_logps": padded(sequences, "old"), "ref_per_token_logps": padded(sequences, "ref")}
    tokens = padded(sequences, "one").sum()
    batch, give = completions(sequences, logps, advantages=advantages.flatten(), num_items_in_batch=tokens, **old)
    it = trainer(**{
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "importance_sampling_level": "token",
        "use_vllm": False, "_entropy_bonus_enabled": False, "beta": 0.04, **options,
    })  # fmt: skip
    it.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    it._get_per_token_logps_and_entropies = give
    return GRPOTrainer._compute_loss(it, None, batch)


def leave_one_out(sequences, logps, options):
    from trl.trainer.rloo_trainer import RLOOTrainer

    it = trainer(**{"beta": 0.05, **options})
    old, ref = padded(sequences, "old"), padded(sequences, "ref")
    shaped = torch.tensor([s["reward"] for s in sequences], dtype=torch.float64) - it.beta * (old - ref).sum(1)
    grouped = shaped.view(-1, 3)
    advantages = (grouped - (grouped.sum(1, keepdim=True) - grouped) / 2).flatten()
    batch, it._get_per_token_logps_and_entropies = completions(sequences, logps, advantages=advantages, old_logps=old.sum(1))
    return RLOOTrainer._compute_loss(it, None, batch)


THEIRS = {"dpo": pairs, "ipo": pairs, "bradley_terry": rewards, "kto": unpaired, "grpo": relative, "dapo": relative,
          "rloo": leave_one_out}  # fmt: skip


@pytest.mark.parametrize("name, options, theirs", CASES)
def test_equals_trl(name, options, theirs):
    objective = stage.resolve("objectives", name)
    groups = example(name, np.random.default_rng(8), 6)
    if name == "bradley_terry":
        for sequence in (s for g in groups for s in g):
            sequence["label"] = 1.0  # TRL has no soft labels
    batch, leaf = pack(groups, objective, torch.float64)
    found = objective.loss(batch, objective.Config(**options))
    ours = found.sum / found.count
    ours.backward()

    # TRL lays pairs out as all the preferred, then all the others.
    order = [(g, i) for i in range(2) for g in range(6)] if objective.GROUP == "pair" else [
        (g, i) for g in range(6) for i in range(len(groups[g]))
    ]  # fmt: skip
    sequences = [groups[g][i] | {"one": [1.0] * len(groups[g][i]["logp"])} for g, i in order]
    values = torch.tensor([s["score"] for s in sequences], dtype=torch.float64) if objective.NEEDS_SCORES else (
        padded(sequences, "logp")
    )  # fmt: skip
    values.requires_grad_()
    loss = THEIRS[name](sequences, values, theirs)
    loss.backward()
    assert float(ours.detach()) == pytest.approx(float(loss.detach()), rel=1e-9)

    mine = iter(leaf.grad.tolist())
    gradients = {}
    for g, group in enumerate(groups):
        for i, s in enumerate(group):
            gradients[g, i] = [next(mine) for _ in range(1 if objective.NEEDS_SCORES else len(s["logp"]))]
    for place, row in zip(order, values.grad.reshape(len(order), -1).tolist(), strict=True):
        assert gradients[place] == pytest.approx(row[: len(gradients[place])], rel=1e-7, abs=1e-12)
