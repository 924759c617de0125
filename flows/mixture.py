"""Which mix of domains to pretrain on: small models on random mixes, and the loss of each domain as a function of the mix.

`cuvee run recipe=mixture mixing.domains=[code,names,prose]`, at any scale; then pretrain.blend takes the best mix.
"""

from __future__ import annotations

from flows._parts import having
from stages.data.mixture import mixes


def recipe(step, conf) -> None:
    corpus = step("corpus", "data.curate", conf.data)
    tokenizer = step("tokenizer", "data.tokenizer", conf.tokenizer, corpus=corpus)
    tokens = step("tokens", "data.tokens", conf.tokens, corpus=corpus, tokenizer=tokenizer)

    models = {}
    for number, blend in enumerate(mixes(list(conf.mixing.domains), conf.mixing.models, conf.mixing.seed)):
        own = having(conf.pretrain, blend=blend, max_epochs=conf.mixing.max_epochs)
        models[f"mix-{number:02d}"] = step(f"mix-{number:02d}", "train.pretrain", own, tokens=tokens)
    step("mixture", "data.mixture", conf.mixture, models=models, tokens=tokens)
