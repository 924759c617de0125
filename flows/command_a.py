"""Cohere's Command A: raw text -> base -> instruct -> six SFT experts -> soup -> six RL experts -> soup -> polish.

Each line is a stage with an artifact of its own: step(name, stage, configuration, inputs). Facts and figures:
"Command A: An Enterprise-Ready Large Language Model" (arXiv 2504.00698), sections 2 and 3. What an expert does
differently from the others stands in conf/expert/<name>.yaml.
"""

from __future__ import annotations

from flows._parts import averaged, domains, having, sampled_pairs, seeded


def recipe(step, conf) -> None:
    experts = conf.recipe.experts

    # Data: curate, train the tokenizer, write the tokens
    corpus = step("corpus", "data.curate", conf.data)
    prompts = {e: step(f"prompts-{e}", "data.prompts", conf.expert[e].prompts, corpus=corpus) for e in domains(conf)}
    tokenizer = step("tokenizer", "data.tokenizer", conf.tokenizer, corpus=corpus, prompts=prompts)
    tokens = step("tokens", "data.tokens", conf.tokens, corpus=corpus, tokenizer=tokenizer, prompts=prompts)

    # Pretraining, then the cooldown that extends the context
    pretrained = step("pretrained", "train.pretrain", conf.pretrain, tokens=tokens)
    base = step("base", "train.pretrain", conf.cooldown, tokens=tokens, init=pretrained)

    # Instruct
    chats = own_conversations(step, conf, tokenizer, prompts)
    instruct = step("instruct", "train.sft", conf.instruct, init=base, prompts=prompts, conversations=chats,
                    tokens=tokens if conf.instruct.replay else None)

    # Your own preferences, beside the pairs that policies sample
    own = step("preferences", "data.preferences", conf.preferences, tokenizer=tokenizer) if conf.preferences.sources else None

    # Six SFT experts from Instruct, and their soup
    sft = {e: sft_expert(step, e, conf, {"instruct": instruct, "base": base}, prompts, tokens) for e in experts}
    sft_soup = step("sft-soup", "merge.soup", conf.soup.sft, models=sft, base=instruct)

    # The reward model that judges later stages: of the answers of one of these, and made from it
    policy = {"instruct": instruct, "sft-soup": sft_soup}[conf.recipe.reward_policy]
    reward = reward_model(step, conf.reward, conf.recipe.reward_seeds, policy, prompts, own)

    # Six RL experts from the soup, and their soup
    rl = {e: rl_expert(step, e, conf, sft, sft_soup, instruct, prompts, tokens) for e in experts}
    rl_soup = step("rl-soup", "merge.soup", conf.soup.rl, models=rl, base=sft_soup)

    # Polish, in rounds: SFT on the best of N, offline preference, online RL; what the judge prefers goes on
    rounds = {"rl-soup": rl_soup}
    for number in range(1, conf.recipe.polish_rounds + 1):
        last = "polished" if number == conf.recipe.polish_rounds else f"polished-{number}"
        rounds |= polish(step, conf.polish, number, last, list(rounds.values())[-1], prompts, reward, own)

    # Evaluate every model on every domain, export, report
    models = {"pretrained": pretrained, "base": base, "instruct": instruct,
              **{f"sft-{e}": m for e, m in sft.items()}, "sft-soup": sft_soup,
              **{f"rl-{e}": m for e, m in rl.items()}, **rounds}
    scores = {name: step(f"scores-{name}", "evaluation.evaluate", conf.evaluate,
                         model=model, prompts=prompts, tokens=tokens, reward=reward, corpus=corpus)
              for name, model in models.items()}
    if conf.judged.teachers:
        step("judged", "teacher.compare", conf.judged, models={m: scores[m] for m in rounds}, baseline=scores["instruct"], prompts=prompts)
    export = step("export", "export.huggingface", conf.export, model=list(rounds.values())[-1])
    step("report", "report.report", conf.report, scores=scores, export=export, corpus=corpus, reward=reward)


def own_conversations(step, conf, tokenizer, prompts):
    """What Instruct learns beside the generated tasks: your conversations, and those that teachers write to the prompts."""
    found = {}
    if conf.conversations.sources:
        found["user"] = step("conversations", "data.conversations", conf.conversations, tokenizer=tokenizer)
    if conf.synthetic.teachers:
        found["synthetic"] = step("synthetic", "data.synthetic", conf.synthetic, prompts=prompts)
    return found


def reward_model(step, conf, seeds, policy, prompts, own):
    """Section 3.2.3: an ensemble labels many pairs for the first stage; the second learns from the best pairs, labelled
    by the strength of the preference. The probe tells how far one may optimise against it."""
    many, best, probe = sampled_pairs(step, conf, policy, prompts)
    ensemble = {str(s): step(f"reward-judge-{s}", "train.reward", seeded(conf.judge, s), init=policy, pairs=best, own=own)
                for s in seeds}
    first = step("reward-first", "train.reward", conf.first, init=policy, pairs=many, ensemble=ensemble)
    return step("reward", "train.reward", conf.second, start=first, pairs=best, own=own, ensemble=ensemble, probe=probe)


def sft_expert(step, name, conf, starts, prompts, tokens):
    """Section 3.3: SFT with each seed, and a second one on the best data where `refine_seeds` has any."""
    own = conf.expert[name]
    first = f"sft-{name}-first" if own.refine_seeds else f"sft-{name}"
    model = best_seeds(step, first, conf, own.sft, own.seeds, starts[own.start], prompts, tokens)
    if not own.refine_seeds:
        return model
    return best_seeds(step, f"sft-{name}", conf, refined(own), own.refine_seeds, model, prompts, tokens)


def refined(own):
    """The second SFT: the first with what `refine` says of it; its mix is the first's where it names none."""
    return having(own.sft, **{name: value for name, value in own.refine.items() if value != {}})


def best_seeds(step, name, conf, sft, seeds, init, prompts, tokens):
    """Section 3.3.3: the average of the best `recipe.seeds_kept` seeds, by held-out prompts that no score is reported of."""
    judged = having(conf.evaluate, skip=conf.evaluate.prompts_per_domain)
    return averaged(step, name, sft, seeds, conf.average, init, prompts, tokens, conf.recipe.seeds_kept, judged)


def rl_expert(step, name, conf, sft, soup, instruct, prompts, tokens):
    """RL from the soup. Section 3.3.3's regularisers: `redo` trains the expert again, from a soup without it, and starts
    there; `anchor` merges the result with what it started from; the third is conf.rl.sft_weight."""
    own, start = conf.expert[name], soup
    if own.redo:
        others = {e: model for e, model in sft.items() if e != name}
        weights = {e: weight for e, weight in conf.soup.sft.weights.items() if e != name}
        start = step(f"sft-soup-without-{name}", "merge.soup", having(conf.soup.sft, weights=weights),
                     models=others, base=instruct)
        start = best_seeds(step, f"sft-{name}-again", conf, refined(own), own.refine_seeds or own.seeds,
                           start, prompts, tokens)
    if not own.anchor:
        return step(f"rl-{name}", "train.rl", own.rl, init=start, prompts=prompts)
    alone = step(f"rl-{name}-alone", "train.rl", own.rl, init=start, prompts=prompts)
    anchored = having(conf.average, weights={"rl": 1 - own.anchor, "start": own.anchor})
    return step(f"rl-{name}", "merge.soup", anchored, models={"rl": alone, "start": start}, base=start)


def polish(step, conf, number, name, start, prompts, reward, own):
    """One round. Whichever of its models the judge prefers to the round's start goes on, and the start where none is
    preferred: so every round is known before anything runs, and none can make the model worse by its judge."""
    at = "" if number == 1 else f"-{number}"
    drawn = step(f"best-of-n-samples{at}", "rollout.sample", seeded(conf.best_of_n.samples, 2 * number - 2),
                 policy=start, prompts=prompts, reward=reward)
    best_of_n = step(f"best-of-n{at}", "train.sft", conf.best_of_n.sft, init=start, pairs=drawn)
    pairs = step(f"preference-pairs{at}", "rollout.sample", seeded(conf.preference.samples, 2 * number - 1),
                 policy=best_of_n, prompts=prompts, reward=reward)
    preference = step(f"preference{at}", "train.preference", conf.preference.train, init=best_of_n, pairs=pairs, own=own)
    online = step(f"online{at}", "train.rl", seeded(conf.online, number - 1),
                  init=preference, prompts=prompts, reward=reward)
    made = {f"best-of-n{at}": best_of_n, f"preference{at}": preference, f"online{at}": online}
    chosen = step(name, "evaluation.choose", conf.choose, start=start, models=made, prompts=prompts, reward=reward)
    return made | {name: chosen}
