"""Every objective: golden values, gradients, and independence of how sequences are packed and split."""

import math

import numpy as np
import pytest
import torch
from objective_formulas import FORMULAS

from stages import stage
from stages.train._groups import needs_values
from stages.trainer.batch import Loss, Packed

NAMES = stage.names("objectives")


def pack(groups, objective, dtype=torch.float32):
    """groups: [[{"logp": [...], "ref": [...], "old": [...], "score": r, **fields}, ...], ...] -> (Packed, its leaf
    tensor), with what the objective needs. "mask" may be given; the leaf is logprobs, or scores if needed. For distill
    logp is that of 2 teacher's tokens and the own one in turn, "old" has the teacher's."""
    flat = [(g, s) for g, group in enumerate(groups) for s in group]
    lengths = [len(s["logp"]) for _, s in flat]
    cat = lambda key, fill: torch.tensor(  # noqa: E731
        [v for _, s in flat for v in s.get(key, [fill] * len(s["logp"]))], dtype=dtype
    )
    names = [k for k in flat[0][1] if k not in ("logp", "ref", "old", "mask", "score", "advantage")]
    leaf = cat("logp", 0.0).requires_grad_()
    packed = Packed(
        logprobs=leaf,
        mask=cat("mask", 1.0),
        sequence=torch.repeat_interleave(torch.arange(len(flat)), torch.tensor(lengths)),
        group=torch.tensor([g for g, _ in flat]),
        fields={name: torch.tensor([s[name] for _, s in flat], dtype=dtype) for name in names},
        reference=cat("ref", 0.0) if objective.NEEDS_REFERENCE else None,
        behaviour=cat("old", 0.0) if objective.NEEDS_BEHAVIOUR else None,
    )
    if needs_values(objective):
        packed.token_fields = {"advantage": cat("advantage", 0.0)}
    if objective.__name__.endswith("distill"):
        packed.teacher = cat("old", 0.0).view(-1, 3)[:, :2]
    if objective.NEEDS_SCORES:
        leaf = packed.scores = torch.tensor([s["score"] for _, s in flat], dtype=dtype).requires_grad_()
    return packed, leaf


def value(name, groups, **options) -> float:
    objective = stage.resolve("objectives", name)
    batch, _ = pack(groups, objective)
    result = objective.loss(batch, objective.Config(**options))
    return float(result.sum) / float(result.count)


def pair(gap, **more):
    return [{"logp": [gap], "ref": [0.0], "chosen": 1.0, **more}, {"logp": [0.0], "ref": [0.0], "chosen": 0.0, **more}]


def revisions(w, low, wl, lw, ll, ww):
    rows = [(w, 1, -1), (low, 0, -1), (wl, 1, 0), (lw, 0, 1), (ll, 0, 0), (ww, 1, 1)]
    return [{"logp": [h - 3], "ref": [-3.0], "chosen": c, "draft": d} for h, c, d in rows]


def example(name, rng, groups=5):
    """Random groups for the objective, of uneven lengths."""
    kind = stage.resolve("objectives", name).GROUP
    roles = {
        "single": [{}],
        "pair": [{"chosen": 1.0, "label": 0.8, "margin": 0.2}, {"chosen": 0.0, "label": 0.0, "margin": 0.0}],
        "completions": [{"reward": None, "baseline": 0.3}] * 3,
        "revisions": [{"chosen": c, "draft": d} for c, d in ((1, -1), (0, -1), (1, 0), (0, 1), (0, 0), (1, 1))],
    }[kind]
    made = []
    for _ in range(groups):
        made.append([])
        for role in roles:
            n = int(rng.integers(1, 5)) * (3 if name == "distill" else 1)
            fields = {k: float(rng.normal()) if v is None else float(v) for k, v in role.items()}
            logp = -rng.exponential(size=n)
            made[-1].append(
                {
                    "logp": list(logp),
                    "old": list(logp + 0.3 * rng.normal(size=n)),  # ratios on both sides of every clip
                    "ref": list(-rng.exponential(size=n)),
                    "score": float(rng.normal()),
                    "advantage": list(rng.normal(size=n)),
                    **fields,
                }
            )
    return made


@pytest.mark.parametrize(
    "name, groups, options, expected",
    [
        ("dpo", [pair(0.37)], {"beta": 0.1}, 0.674818),
        ("ipo", [pair(0.37)], {"beta": 0.1}, 21.4369),
        ("ipo", [pair(0.37)], {"beta": 0.1, "average": False}, 21.4369),
        ("srpo", [revisions(0.2, -0.1, 0.4, -0.3, 0.1, 0.15)], {"beta": 0.1, "alpha": 0.0}, 0.2025),
        ("srpo", [revisions(0.2, -0.1, 0.4, -0.3, 0.1, 0.15)], {"beta": 0.1, "alpha": 1.0}, (0.2209 + 0.207025) / 2),
        ("srpo", [revisions(0.2, -0.1, 0.4, -0.3, 0.1, 0.15)], {"beta": 0.1, "alpha": 0.25}, 0.205365625),
        (
            "copg",
            [
                [
                    {"logp": [p], "ref": [q], "reward": r}
                    for r, p, q in ((1.0, -5.0, -5.5), (0.0, -6.0, -5.8), (0.5, -7.0, -7.1))
                ]
            ],
            {"beta": 0.06, "rescale": False},
            0.688332,
        ),
        ("ce", [[{"logp": [-1.0, -2.0, -3.0], "mask": [0.0, 1.0, 1.0]}]], {}, 2.5),
    ],
)
def test_golden_values(name, groups, options, expected):
    assert value(name, groups, **options) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(
    "winner, loser, fields, options, expected",
    [
        (1.2, 0.5, {"label": 1.0, "margin": 0.3}, {}, 0.513015),
        (0.7, 0.0, {"label": 0.85}, {}, 0.508186),
        (1.2, 0.5, {"label": 1.0, "margin": 0.3}, {"centring": 0.01}, 0.513015 + 0.01 * 1.7**2),
    ],
)
def test_bradley_terry_golden_values(winner, loser, fields, options, expected):
    groups = [pair(0.0, **fields)]
    groups[0][0]["score"], groups[0][1]["score"] = winner, loser
    assert value("bradley_terry", groups, **options) == pytest.approx(expected, rel=2e-6)


def test_dpo_with_label_smoothing_weighs_both_orders_of_a_pair():
    pairs = example("dpo", np.random.default_rng(3))
    turned = [[s | {"chosen": 1 - s["chosen"]} for s in pair] for pair in pairs]
    expected = 0.8 * value("dpo", pairs) + 0.2 * value("dpo", turned)
    assert value("dpo", pairs, label_smoothing=0.2) == pytest.approx(expected, rel=1e-5) != value("dpo", pairs)


def test_copg_gradient_is_the_leave_one_out_advantage():
    """A = (.717, -.72, .003) by hand; rescaled, the gradient on each log-probability is -A."""
    rows = ((1.0, -5.0, -5.5), (0.0, -6.0, -5.8), (0.5, -7.0, -7.1))
    copg = stage.resolve("objectives", "copg")
    batch, leaf = pack([[{"logp": [p], "ref": [q], "reward": r} for r, p, q in rows]], copg)
    copg.loss(batch, copg.Config(beta=0.06)).sum.backward()
    assert leaf.grad.tolist() == pytest.approx([-0.717, 0.72, -0.003], abs=1e-6)


def test_copg_with_rewards_half_apart_is_ipo_times_beta_squared():
    rng = np.random.default_rng(1)
    groups = example("copg", rng)
    for group in groups:
        del group[2:]
        for sequence, chosen in zip(group, (1.0, 0.0), strict=True):
            sequence.update(reward=chosen / 2, chosen=chosen)
    ipo = value("ipo", groups, beta=0.2, average=False)
    assert value("copg", groups, beta=0.2, rescale=False) == pytest.approx(0.2**2 * ipo, rel=1e-5)
    rescaled = value("ipo", groups, beta=0.2, average=False, rescale=True)
    assert value("copg", groups, beta=0.2) == pytest.approx(rescaled, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_formula_in_numpy(name):
    groups = example(name, np.random.default_rng(2), 20)
    assert value(name, groups) == pytest.approx(FORMULAS[name](groups), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_float64(name):
    """float32 gradients against float64 ones, and those against finite differences."""
    objective = stage.resolve("objectives", name)
    groups = example(name, np.random.default_rng(3))
    grads = {}
    for dtype in (torch.float32, torch.float64):
        batch, leaf = pack(groups, objective, dtype)
        objective.loss(batch, objective.Config()).sum.backward()
        grads[dtype] = leaf.grad
    torch.testing.assert_close(grads[torch.float32].double(), grads[torch.float64], rtol=1e-4, atol=1e-5)

    def function(x):
        if objective.NEEDS_SCORES:
            batch.scores = x
        else:
            batch.logprobs = x
        return objective.loss(batch, objective.Config()).sum

    assert torch.autograd.gradcheck(function, leaf.detach().clone().requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_does_not_depend_on_microbatches_or_packing(name):
    """One microbatch, one a group, and any order of groups and of the sequences in them give one sum and count."""
    objective = stage.resolve("objectives", name)
    rng = np.random.default_rng(4)
    groups = example(name, rng, 7)

    def totals(*batches) -> dict[str, float]:
        found: dict[str, float] = {}
        for batch in batches:
            packed, _ = pack(batch, objective, torch.float64)
            result = objective.loss(packed, objective.Config())
            assert isinstance(result, Loss)
            for key, numbers in {"loss": result.sum, "count": result.count, **result.metrics}.items():
                for i, number in enumerate(numbers if isinstance(numbers, tuple) else (numbers,)):
                    assert not getattr(number, "requires_grad", False) or key == "loss"
                    name = f"{key} {i}" if i else key
                    found[name] = found.get(name, 0.0) + float(number)
        return found

    whole = totals(groups)
    assert totals(*[[g] for g in groups]) == pytest.approx(whole)
    assert totals(groups[:3], groups[3:]) == pytest.approx(whole)
    shuffled = [[g[i] for i in rng.permutation(len(g))] for g in (groups[i] for i in rng.permutation(7))]
    assert totals(shuffled) == pytest.approx(whole)
    tokens, sequences = sum(len(s["logp"]) for g in groups for s in g), sum(map(len, groups))
    tokens //= 3 if name == "distill" else 1
    assert whole["count"] == {"tokens": tokens, "sequences": sequences, "groups": 7}[objective.COUNT]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("targets", ["masked", "none"])
def test_all_masked_batch_is_zero_without_nan(name, targets):
    objective = stage.resolve("objectives", name)
    groups = example(name, np.random.default_rng(5))
    for sequence in (s for g in groups for s in g):
        if targets == "none":
            sequence |= dict.fromkeys(("logp", "ref", "old", "advantage"), [])
        sequence["mask"] = [0.0] * len(sequence["logp"])
    batch, leaf = pack(groups, objective)
    result = objective.loss(batch, objective.Config())
    result.sum.backward()
    assert float(result.sum) == 0 and float(result.count) == 0
    assert leaf.grad is None or bool((leaf.grad == 0).all())
    assert all(float(v) == 0 for value in result.metrics.values() for v in (value if isinstance(value, tuple) else [value]))


@pytest.mark.parametrize("name", ["copg", "dapo", "grpo", "mdloo", "rloo"])
def test_a_sequence_without_targets_leaves_its_group_only(name):
    groups = example(name, np.random.default_rng(6), 2)
    fewer = [groups[0], groups[1][:2]]
    groups[1][2]["mask"] = [0.0] * len(groups[1][2]["logp"])
    assert value(name, groups) == pytest.approx(value(name, fewer), rel=1e-6)
    single = [groups[0], groups[1][:1]]
    assert value(name, single) == pytest.approx(value(name, [groups[0]]), rel=1e-6), "k = 1 contrasts nothing"


def bandit(objective, config, steps=500, batch=512, lr=0.02):
    """A softmax over three arms trained on pairs from fixed, skewed samplers. Returns the policy."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.tensor([2.5, 2.0, 1.0])
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=lr)
    first, second = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.05, 0.05, 0.9])
    for _ in range(steps):
        arms = torch.stack([torch.multinomial(p, batch, True, generator=generator) for p in (first, second)], 1)
        arms = arms.flatten()
        logprobs = logits.log_softmax(0)[arms]
        group = torch.arange(batch).repeat_interleave(2)
        packed = Packed(
            logprobs,
            torch.ones(2 * batch),
            torch.arange(2 * batch),
            group,
            {"reward": rewards[arms]},
            torch.full((2 * batch,), -math.log(3)),
        )
        result = objective.loss(packed, config)
        optimizer.zero_grad()
        (result.sum / result.count).backward()
        optimizer.step()
    return logits.detach().double().softmax(0)


def test_copg_bandit_reaches_the_closed_form_optimum_off_policy():
    """R = (2.5, 2, 1), beta .5, uniform reference: pi* = ref exp(R/beta)/Z = (.7054, .2595, .0351), J* = 2.1252."""
    copg = stage.resolve("objectives", "copg")
    policy = bandit(copg, copg.Config(beta=0.5, rescale=False))
    assert policy.tolist() == pytest.approx([0.7054, 0.2595, 0.0351], abs=2e-3)
    rewards = torch.tensor([2.5, 2.0, 1.0], dtype=torch.float64)
    regularised = (policy * (rewards - 0.5 * (policy * 3).log())).sum()
    assert 2.1252 - float(regularised) < 1e-4


def tabular(n=4, beta=0.3):
    """The exact solution of SRPO's min-max for n answers: (P, ref, ref given a draft, pi, reviser), in float64."""
    rng = np.random.default_rng(7)
    strength = rng.normal(size=n)
    p = 1 / (1 + np.exp(strength[None] - strength[:, None] + 0.3 * (noise := rng.normal(size=(n, n))) - 0.3 * noise.T))
    normal = lambda x: x / x.sum(0)  # noqa: E731
    ref, ref_given = normal(rng.random(n)), normal(rng.random((n, n)))  # ref_given[b, a]
    tilted = ref_given * np.exp(p / beta)
    z = tilted.sum(0)
    return p, ref, ref_given, normal(ref / z), tilted / z


def test_srpo_identities_are_exact_at_the_tabular_solution():
    beta = 0.3
    p, ref, ref_given, pi, reviser = tabular(beta=beta)
    h, g = np.log(pi / ref), np.log(reviser / ref_given)
    own = np.diagonal(g)
    np.testing.assert_allclose(0.5 + beta * (g - own[None]), p, atol=1e-12)
    np.testing.assert_allclose(0.5 + beta / 2 * (h[:, None] - h[None] + g - g.T), p, atol=1e-12)


def test_srpo_loss_has_its_minimum_at_the_tabular_solution():
    """Over pairs labelled by P, the loss's gradient vanishes at the closed-form policy and reviser."""
    beta, alpha = 0.3, 0.25
    p, ref, ref_given, pi, reviser = tabular(beta=beta)
    n, srpo = len(ref), stage.resolve("objectives", "srpo")
    plain = torch.tensor(np.log(pi)).requires_grad_()
    given = torch.tensor(np.log(reviser)).requires_grad_()
    log_ref, log_ref_given = torch.tensor(np.log(ref)), torch.tensor(np.log(ref_given))

    def pair_loss(w, low):
        at = [(w, None), (low, None), (w, low), (low, w), (low, low), (w, w)]
        pick = lambda table, cond: [cond[y, a] if a is not None else table[y] for y, a in at]  # noqa: E731
        fields = {"chosen": [1, 0, 1, 0, 0, 1], "draft": [-1, -1, 0, 1, 0, 1]}
        batch = Packed(
            torch.stack(pick(plain.log_softmax(0), given.log_softmax(0))),
            torch.ones(6, dtype=torch.float64),
            torch.arange(6),
            torch.zeros(6, dtype=torch.int64),
            {k: torch.tensor(v, dtype=torch.float64) for k, v in fields.items()},
            torch.stack(pick(log_ref, log_ref_given)),
        )
        return srpo.loss(batch, srpo.Config(beta=beta, alpha=alpha)).sum

    total = sum(p[w, low] * pair_loss(w, low) for w in range(n) for low in range(n) if w != low)
    total.backward()
    assert float(plain.grad.abs().max()) < 1e-9 and float(given.grad.abs().max()) < 1e-9
