"""What the recipes share: the beginning of each, its end, and runs of one stage with several seeds."""

from __future__ import annotations


def domains(conf):
    """The experts, and what has prompts without an expert."""
    return list(dict.fromkeys([*conf.recipe.experts, *conf.recipe.get("also", [])]))


def data(step, conf):
    """(corpus, prompts of each domain, tokens): curate, generate, train the tokenizer, write the tokens."""
    corpus = step("corpus", "data.curate", conf.data)
    prompts = {e: step(f"prompts-{e}", "data.prompts", conf.expert[e].prompts, corpus=corpus)
               for e in domains(conf)}
    tokenizer = step("tokenizer", "data.tokenizer", conf.tokenizer, corpus=corpus, prompts=prompts)
    return corpus, prompts, step("tokens", "data.tokens", conf.tokens, corpus=corpus, tokenizer=tokenizer, prompts=prompts)


def close(step, conf, models, final, corpus, prompts, tokens, reward):
    """Evaluate every model on every domain, export the final one, report."""
    scores = {name: step(f"scores-{name}", "evaluation.evaluate", conf.evaluate,
                         model=model, prompts=prompts, tokens=tokens, reward=reward, corpus=corpus)
              for name, model in models.items()}
    export = step("export", "export.huggingface", conf.export, model=final)
    step("report", "report.report", conf.report, scores=scores, export=export, corpus=corpus, reward=reward)


def sampled_pairs(step, conf, policy, prompts, at=""):
    """(many pairs, the best pairs, held-out prompts with many completions): what a reward model learns from, and is
    probed with."""
    return [step(f"reward-{name}{at}", "rollout.sample", conf[part], policy=policy, prompts=prompts)
            for name, part in (("pairs-many", "many"), ("pairs", "best"), ("probe", "probe"))]


def averaged(step, name, conf, seeds, average, init, prompts, tokens, kept=0, judged=None):
    """SFT with every seed, averaged; of a single seed the model itself. Where `kept` is less than the seeds, the best ones
    on the domain that the mix has most of, by the evaluation section `judged`."""
    inputs = {"init": init, "prompts": prompts, "tokens": tokens if conf.replay else None}
    if len(seeds) == 1:
        return step(name, "train.sft", seeded(conf, seeds[0]), **inputs)
    models = {str(s): step(f"{name}-seed-{s}", "train.sft", seeded(conf, s), **inputs) for s in seeds}
    if not 0 < kept < len(seeds):
        return step(name, "merge.soup", average, models=models, base=init)
    own = {d: prompts[d] for d, share in conf.mix.items() if share == max(conf.mix.values())} or prompts
    scores = {s: step(f"trial-{name}-{s}", "evaluation.evaluate", judged, model=model, prompts=own)
              for s, model in models.items()}
    return step(name, "merge.soup", having(average, top=kept), models=models, base=init, scores=scores)


def seeded(conf, by):
    """The section with `by` added to its seed, still known by its name."""
    return having(conf, seed=conf.seed + by)


def having(conf, **fields):
    """The section with other values in some fields (a dictionary's instead of its own), still known by its name."""
    found = conf.copy()
    for name, value in fields.items():
        found[name] = value
    return found
