"""Aya Expanse (Dang et al., arXiv 2412.04261): a model for each group of languages, arbitrage among teachers, and rounds
of preference training, merged after each step. Here the recipe's experts stand for the groups of languages.

`cuvee run recipe=aya_expanse`, at any scale.
"""

from __future__ import annotations

from flows._parts import close, data, sampled_pairs, seeded


def recipe(step, conf) -> None:
    groups = conf.recipe.experts
    corpus, prompts, tokens = data(step, conf)
    base = step("base", "train.pretrain", conf.pretrain, tokens=tokens)
    instruct = step("instruct", "train.sft", conf.instruct, init=base, prompts=prompts)
    _, best, probe = sampled_pairs(step, conf.reward, instruct, prompts)
    reward = step("reward", "train.reward", conf.reward.second, init=instruct, pairs=best, probe=probe)

    # Teachers of every group answer the same prompts; each prompt's best answer by the reward model teaches (section 2.1)
    teachers = {g: step(f"teacher-{g}", "train.sft", conf.expert[g].sft, init=instruct, prompts=prompts)
                for g in groups}
    answers = {g: step(f"answers-{g}", "rollout.sample", conf.polish.best_of_n.samples,
                       policy=teachers[g], prompts=prompts, reward=reward) for g in groups}
    arbitrage = step("arbitrage", "rollout.pool", conf.arbitrage, pools=answers)
    students = {g: step(f"sft-{g}", "train.sft", seeded(conf.polish.best_of_n.sft, i), init=instruct, pairs=arbitrage)
                for i, g in enumerate(groups)}
    models = {"base": base, "instruct": instruct,
              "merged": step("merged", "merge.soup", conf.average, models=students, base=instruct)}

    # Offline preference training, then rounds with the models' own new samples; a merge after each (sections 2.2, 2.3)
    for number in range(conf.recipe.polish_rounds + 1):
        start, name = list(models.values())[-1], f"preferred-{number}"
        pairs = step(f"pairs-{number}", "rollout.sample", seeded(conf.polish.preference.samples, number),
                     policy=start, prompts=prompts, reward=reward)
        trained = {str(s): step(f"{name}-seed-{s}", "train.preference", seeded(conf.polish.preference.train, s),
                                init=start, pairs=pairs) for s in conf.recipe.seeds}
        models[name] = step(name, "merge.soup", conf.average, models=trained, base=start)
    close(step, conf, models, list(models.values())[-1], corpus, prompts, tokens, reward)
