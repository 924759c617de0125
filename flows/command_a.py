"""Cohere's Command A: raw text -> base -> instruct -> six SFT experts -> soup -> six RL experts -> soup -> polish.

Each line is a stage with an artifact of its own: step(name, stage, configuration, inputs). Facts and figures:
"Command A: An Enterprise-Ready Large Language Model" (arXiv 2504.00698), sections 2 and 3.
"""

from __future__ import annotations


def recipe(step, conf) -> None:
    experts = conf.recipe.experts

    # Data: curate, train the tokenizer, write the tokens
    corpus = step("corpus", "data.curate", conf.data)
    prompts = {e: step(f"prompts-{e}", "data.prompts", conf.expert[e].prompts, corpus=corpus) for e in experts}
    tokenizer = step("tokenizer", "data.tokenizer", conf.tokenizer, corpus=corpus, prompts=prompts)
    tokens = step("tokens", "data.tokens", conf.tokens, corpus=corpus, tokenizer=tokenizer, prompts=prompts)

    # Pretraining, then the cooldown that extends the context
    pretrained = step("pretrained", "train.pretrain", conf.pretrain, tokens=tokens)
    base = step("base", "train.pretrain", conf.cooldown, tokens=tokens, init=pretrained)

    # Instruct, and the reward model that judges later stages
    instruct = step("instruct", "train.sft", conf.instruct, init=base, prompts=prompts)
    samples = step("reward-pairs", "rollout.sample", conf.reward.pairs, policy=instruct, prompts=prompts)
    reward = step("reward", "train.reward", conf.reward.train, init=instruct, pairs=samples)

    # Six SFT experts from Instruct, and their soup
    sft = {e: step(f"sft-{e}", "train.sft", conf.expert[e].sft, init=instruct, prompts=prompts) for e in experts}
    sft_soup = step("sft-soup", "merge.soup", conf.soup.sft, models=sft, base=instruct)

    # Six RL experts from the soup, and their soup
    rl = {e: step(f"rl-{e}", "train.rl", conf.expert[e].rl, init=sft_soup, prompts=prompts) for e in experts}
    rl_soup = step("rl-soup", "merge.soup", conf.soup.rl, models=rl, base=sft_soup)

    # Polish: SFT on the best of N, offline preference, online RL
    best = step("best-of-n-samples", "rollout.sample", conf.polish.best_of_n.samples,
                policy=rl_soup, prompts=prompts, reward=reward)
    best_of_n = step("best-of-n", "train.sft", conf.polish.best_of_n.sft, init=rl_soup, pairs=best)
    pairs = step("preference-pairs", "rollout.sample", conf.polish.preference.samples,
                 policy=best_of_n, prompts=prompts, reward=reward)
    preference = step("preference", "train.preference", conf.polish.preference.train, init=best_of_n, pairs=pairs)
    polished = step("polished", "train.rl", conf.polish.online, init=preference, prompts=prompts, reward=reward)

    # Evaluate every model on every domain, export, report
    models = {"pretrained": pretrained, "base": base, "instruct": instruct,
              **{f"sft-{e}": m for e, m in sft.items()}, "sft-soup": sft_soup,
              **{f"rl-{e}": m for e, m in rl.items()}, "rl-soup": rl_soup,
              "best-of-n": best_of_n, "preference": preference, "polished": polished}
    scores = {name: step(f"scores-{name}", "evaluation.evaluate", conf.evaluate,
                         model=model, prompts=prompts, tokens=tokens, reward=reward) for name, model in models.items()}
    export = step("export", "export.huggingface", conf.export, model=polished)
    step("report", "report.report", conf.report, scores=scores, export=export, corpus=corpus)
