"""Self-Improving Robust Preference Optimisation (Choi et al., arXiv 2406.01660), one network in both roles.

pi answers x; the reviser p, the same network under a revise prompt with x and a draft a, answers again:
    min_pi max_p  E_x E_{a~pi, b~p(.|x,a)} [ P(b > a|x) - beta KL(p || ref | x,a) + beta KL(pi || ref | x) ]

With h(y) = log pi(y|x)/ref(y|x) and g(b|a) = log p(b|x,a)/ref(b|x,a), token sums, the reference scoring revisions under
the same revise prompt, its solution obeys exactly
    (i)  P(b > a) = 1/2 + beta [g(b|a) - g(a|a)]        (ii)  P(b > a) = 1/2 + beta/2 [h(b) - h(a) + g(b|a) - g(a|b)]
and the loss of a pair w > l (P = 1) is the squared error of both:
    L_pi  = [1/2 - beta/2 (h_w - h_l + g(w|l) - g(l|w))]^2
    L_rev = 1/2 { [1/2 - beta (g(w|l) - g(l|l))]^2 + [1/2 - beta (g(w|w) - g(l|w))]^2 }
    L     = (1 - alpha) L_pi + alpha L_rev

A group is a pair as SIX sequences, told apart by two fields. `chosen`: 1 if the completion (the target tokens) is w,
0 if it is l. `draft`: -1 without a draft (the plain prompt), 1 if the prompt carries w as the draft, 0 if it carries l.
    plain w (1,-1)   plain l (0,-1)   w|l (1,0)   l|w (0,1)   l|l (0,0)   w|w (1,1)
beta and alpha of Command A are not published; the defaults are those of the paper.
"""

from dataclasses import dataclass

from stages.objectives._common import complete, log_ratio, pick, total, within
from stages.stage import option
from stages.trainer.batch import Loss, Packed

GROUP = "revisions"
NEEDS_REFERENCE = True
NEEDS_SCORES = False
NEEDS_BEHAVIOUR = False
COUNT = "groups"


@dataclass
class Config:
    beta: float = option(0.01, "strength of the pull to the reference model")
    alpha: float = option(0.25, "weight of the reviser's loss, 0 to 1; the policy's has the rest")

    def check(self) -> None:
        within(self, "alpha", most=1)


def loss(batch: Packed, config: Config) -> Loss:
    """Sum over pairs; count = pairs whose six sequences all have target tokens.

    Metrics: accuracy (share with h_w > h_l), gap (h_w - h_l), policy and reviser (L_pi, L_rev), revision_accuracy
    (share with g(w|l) > g(l|l): the reviser prefers to mend the worse draft).
    """
    chosen, draft, h = batch.fields["chosen"] > 0.5, batch.fields["draft"], log_ratio(batch)
    drafts = {"": draft < -0.5, "l": (draft > -0.5) & (draft < 0.5), "w": draft > 0.5}
    roles = {side + given: (chosen if side == "w" else ~chosen) & at for side in "wl" for given, at in drafts.items()}
    pairs = complete(batch, *roles.values())
    r = {name: pick(batch, h, where) for name, where in roles.items()}  # "wl" is g(w|l)

    beta = config.beta
    policy = (0.5 - beta / 2 * (r["w"] - r["l"] + r["wl"] - r["lw"])) ** 2
    reviser = ((0.5 - beta * (r["wl"] - r["ll"])) ** 2 + (0.5 - beta * (r["ww"] - r["lw"])) ** 2) / 2
    terms = (1 - config.alpha) * policy + config.alpha * reviser
    metrics = {
        "accuracy": total((r["w"] > r["l"]).to(h), pairs),
        "gap": total(r["w"] - r["l"], pairs),
        "policy": total(policy, pairs),
        "reviser": total(reviser, pairs),
        "revision_accuracy": total((r["wl"] > r["ll"]).to(h), pairs),
    }
    return Loss((terms * pairs).sum(), pairs.sum(), metrics)
