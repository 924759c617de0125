"""Qwen (Bai et al., arXiv 2309.16609): pretraining, chat by SFT, a reward model and PPO; a code and a math model beside.

`cuvee run recipe=qwen`, at any scale; model=qwen_7b has its sizes.
"""

from __future__ import annotations

from flows._parts import close, data, sampled_pairs


def recipe(step, conf) -> None:
    corpus, prompts, tokens = data(step, conf)

    # Pretraining at one length, and supervised fine-tuning on ChatML conversations (sections 2 and 3.1)
    base = step("base", "train.pretrain", conf.pretrain, tokens=tokens)
    sft = step("sft", "train.sft", conf.instruct, init=base, prompts=prompts)

    # A reward model pretrained on many pairs, fine-tuned on the best; PPO against it with two answers a prompt (3.2)
    many, best, probe = sampled_pairs(step, conf.reward, sft, prompts)
    first = step("reward-pretrained", "train.reward", conf.reward.first, init=sft, pairs=many)
    reward = step("reward", "train.reward", conf.reward.second, start=first, pairs=best, probe=probe)
    chat = step("chat", "train.rl", conf.polish.online, init=sft, prompts=prompts, reward=reward)

    # Code-Qwen goes on pretraining before its SFT (section 4), Math-Qwen-Chat is an SFT of the chat model's start (5)
    code_base = step("code-base", "train.pretrain", conf.cooldown, tokens=tokens, init=base)
    code = step("code-chat", "train.sft", conf.expert.code.sft, init=code_base, prompts=prompts)
    math = step("math-chat", "train.sft", conf.expert.math.sft, init=sft, prompts=prompts)

    models = {"base": base, "sft": sft, "chat": chat, "code-base": code_base, "code-chat": code, "math-chat": math}
    close(step, conf, models, chat, corpus, prompts, tokens, reward)
