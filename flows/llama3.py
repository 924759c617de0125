"""Llama 3's post-training (arXiv 2407.21783, section 4): in rounds a reward model, rejection sampling, SFT and DPO, the
checkpoints of each step averaged.

`cuvee run recipe=llama3`, at any scale; model=llama3_8b has its sizes.
"""

from __future__ import annotations

from flows._parts import averaged, close, data, sampled_pairs, seeded


def recipe(step, conf) -> None:
    corpus, prompts, tokens = data(step, conf)
    pretrained = step("pretrained", "train.pretrain", conf.pretrain, tokens=tokens)
    base = step("base", "train.pretrain", conf.cooldown, tokens=tokens, init=pretrained)  # longer contexts, annealed
    seeds, models, reward = conf.recipe.seeds, {"base": base}, None
    models["instruct"] = averaged(step, "instruct", conf.instruct, seeds, conf.average, base, prompts, tokens)

    for number in range(1, conf.recipe.polish_rounds + 1):
        best, at = list(models.values())[-1], f"-{number}"
        _, pairs, probe = sampled_pairs(step, conf.reward, best, prompts, at)
        reward = step(f"reward{at}", "train.reward", conf.reward.second, init=base, pairs=pairs, probe=probe)
        drawn = step(f"rejection-samples{at}", "rollout.sample", seeded(conf.polish.best_of_n.samples, number),
                     policy=best, prompts=prompts, reward=reward)
        tuned = {str(s): step(f"sft{at}-seed-{s}", "train.sft", seeded(conf.polish.best_of_n.sft, s),
                              init=best, pairs=drawn) for s in seeds}
        models[f"sft{at}"] = step(f"sft{at}", "merge.soup", conf.average, models=tuned, base=best)
        pairs = step(f"preference-pairs{at}", "rollout.sample", seeded(conf.polish.preference.samples, number),
                     policy=models[f"sft{at}"], prompts=prompts, reward=reward)
        chosen = {str(s): step(f"dpo{at}-seed-{s}", "train.preference", seeded(conf.polish.preference.train, s),
                               init=models[f"sft{at}"], pairs=pairs) for s in seeds}
        models[f"dpo{at}"] = step(f"dpo{at}", "merge.soup", conf.average, models=chosen, base=models[f"sft{at}"])
    close(step, conf, models, list(models.values())[-1], corpus, prompts, tokens, reward)
