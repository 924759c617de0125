"""A byte-level BPE tokenizer from the corpus: digits one by one, the recipe's special tokens and chat template."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

from stages.chat.messages import said
from stages.chat.template import COMMAND, TEMPLATE, Special, special
from stages.data import corpus
from stages.data.document import size
from stages.data.text import units
from stages.stage import Artifact, ConfigError, Context, CuveeError, Input, Kind, option, unknown

VERSION = "2"
INPUTS = {"corpus": Input(Kind.CORPUS), "prompts": Input(Kind.PROMPTS, many=True, optional=True)}
OUTPUT = Kind.TOKENIZER
Group = tuple[str, str]  # domain, language
BYTES = 256
# What a corpus may lack and every tokenizer must carry: other scripts, emoji, runs of white space, numbers, controls.
STRESS = "naïve 汉字 ไทย हिन्दी עברית 한국어 👩‍🔬\n\n\t    indented  \r\n1234567890 ²³ ½ e\u0301 \x00\x7f\ufeff <|almost|>"


@dataclass
class Config:
    vocab_size: int = option(256_000, "tokens, the special ones included")
    template: str = option("command_a", "chat template: a .jinja file of stages/chat")
    sample_bytes: int = option(10_000_000_000, "text to train on, in bytes; the whole corpus where it is smaller")
    balance: float = option(0.5, "a domain and language gets a share ~ bytes to this power; 1 = as in the corpus")
    languages: dict[str, float] = option({}, "language: factor of its share, e.g. {th: 4}, for languages to be added to a corpus' own")
    min_frequency: int = option(2, "fewest occurrences of a pair that becomes a token")
    seed: int = option(0, "decides which documents are in the sample")


def check(config: Config, inputs: dict[str, Any]) -> None:
    """Raises ConfigError for a template that does not exist or a vocabulary too small for bytes and special tokens."""
    if config.template not in TEMPLATE:
        raise ConfigError(f"template: {unknown(config.template, sorted(TEMPLATE))}")
    tokens = special(config.template).tokens
    least = BYTES + len(tokens)
    if config.vocab_size < least:
        raise ConfigError(f"vocab_size: {config.vocab_size} is too small for {BYTES} bytes and "
                          f"{len(tokens)} special tokens; give at least {least}")


def external(config: Config) -> dict[str, str]:
    """The chat template's digest: its text is part of the artifact."""
    return {"template": sha256(TEMPLATE[config.template].encode()).hexdigest()}


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Writes a Hugging Face tokenizer folder and fertility.json.

    The corpus is read as a stream: memory holds the different words. Raises CuveeError when a text does not survive it.
    """
    own = special(config.template)
    texts = partial(_texts, inputs["corpus"], inputs.get("prompts") or {})
    sizes: dict[Group, int] = {}
    for group, text in texts():
        sizes[group] = sizes.get(group, 0) + size(text)
    if missing := [one for one in config.languages if one not in {language for _, language in sizes}]:
        raise ConfigError(f"data.tokenizer.languages: {unknown(missing[0], sorted({language for _, language in sizes if language}))}")
    taken = fractions(sizes, config.sample_bytes, config.balance, config.languages)
    ctx.log(f"training on {sum(taken[group] * sizes[group] for group in sizes) / 1e6:.2f} of {sum(sizes.values()) / 1e6:.2f} MB")
    tokenizer = train(sample(texts(), taken, config.seed), config.vocab_size, config.min_frequency, own)
    save(tokenizer, config.template, out)
    found = fertility(tokenizer, inputs["corpus"].path, own)
    (out / "fertility.json").write_text(json.dumps(found, indent=1) + "\n")
    whole = found["round_trip"]
    return {
        "vocab_size": tokenizer.get_vocab_size(), "bytes_per_token": whole["bytes"] / whole["tokens"],
        **{f"bytes_per_token/{row['language'] or 'unknown'}": row["bytes_per_token"] for row in found["by_language"]},
    }  # fmt: skip


def _texts(source: Artifact, prompts: dict[str, Artifact]) -> Iterator[tuple[Group, str]]:
    """Training texts with their domain and language; the prompts of a domain are a group of their own."""
    for document in corpus.documents(source.path, "train"):
        yield (document["domain"], document["language"]), document["text"]
    for name, artifact in sorted(prompts.items()):
        for prompt in corpus.prompts(artifact.path, "train"):
            yield ("instructions", name), "\n".join([*map(said, prompt["messages"]), prompt["answer"]])


def fractions(sizes: dict[Group, int], budget: int, power: float, languages: dict[str, float]) -> dict[Group, float]:
    """The share of each group's bytes that is taken: ~ bytes^power, times the factor of its language, within the budget, or all
    of it where that is less.

    What small groups leave over goes to the larger ones, in the same proportion.
    """
    weights = {group: count**power * languages.get(group[1], 1.0) for group, count in sizes.items() if count}
    weights = {group: weight for group, weight in weights.items() if weight}
    left, found = budget, {}
    waiting = sorted(weights, key=lambda group: (sizes[group] / weights[group], group))  # first those that are taken whole
    for i, group in enumerate(waiting):
        total = sum(weights[other] for other in waiting[i:])
        share = min(sizes[group], left * weights[group] / total)
        found[group] = share / sizes[group]
        left -= share
    return found


def sample(texts: Iterable[tuple[Group, str]], taken: dict[Group, float], seed: int) -> Iterator[str]:
    """The texts whose hash falls into their group's share: which they are depends on no other text and no order."""
    for group, text in texts:
        share = taken.get(group, 0.0)
        if share >= 1 or share and int.from_bytes(sha256(f"{seed}:{text}".encode()).digest()[:8]) < share * 2**64:
            yield text


def train(texts: Iterable[str], vocab_size: int, min_frequency: int, special: Special = COMMAND) -> Any:
    """A `tokenizers.Tokenizer`. Special tokens have the first ids; every byte has a token, so nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=list(special.tokens), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special.bos} $A", pair=f"{special.bos} $A {special.bos} $B",
        special_tokens=[(special.bos, tokenizer.token_to_id(special.bos))],
    )
    return tokenizer


def save(tokenizer: Any, template: str, out: Path) -> None:
    """The folder that `AutoTokenizer.from_pretrained` loads."""
    from transformers import PreTrainedTokenizerFast

    own = special(template)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=own.bos, eos_token=own.end_of_turn, pad_token=own.pad, unk_token=own.unk,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = TEMPLATE[template]
    wrapped.save_pretrained(out)
    # The name that every release of transformers and every server knows; this release would write its own class's.
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def fertility(tokenizer: Any, path: Path, special: Special = COMMAND) -> dict[str, Any]:
    """Held-out text in tokens, and how much of it was read back from them.

    by_domain: rows of each domain and language, by_language: of each language; with documents, bytes, tokens,
    bytes_per_token, tokens_per_word. round_trip: what came back byte by byte, which all does or CuveeError is raised.
    """
    tokenizer.encode_special_tokens = True  # a special token's name inside a text is text
    rows: dict[tuple[str, ...], list[int]] = {}
    checked = {"documents": 0, "bytes": 0, "tokens": 0, "characters_of_the_stress_test": len(STRESS)}
    stress = {"id": "stress test", "text": STRESS + "".join(special.tokens)}
    documents = chain([stress], corpus.documents(path, "heldout"))
    for some in iter(lambda: list(islice(documents, 256)), []):
        encodings = tokenizer.encode_batch_fast([document["text"] for document in some], add_special_tokens=False)
        for document, encoding in zip(some, encodings, strict=True):
            text, ids = document["text"], encoding.ids
            if tokenizer.decode(ids, skip_special_tokens=False) != text:
                raise CuveeError(f"data.tokenizer: {document['id']} does not come back from its tokens as it was; "
                                 "this is a defect of the tokenizer's settings, not of your text")
            if document is stress:
                continue
            counts = {"documents": 1, "bytes": size(text), "tokens": len(ids)}
            checked |= {name: checked[name] + count for name, count in counts.items()}
            for key in ((document["language"],), (document["language"], document["domain"])):
                row = rows.setdefault(key, [0, 0, 0, 0])
                rows[key] = [a + b for a, b in zip(row, [*counts.values(), len(units(text))], strict=True)]
    tokenizer.encode_special_tokens = False
    found = [
        {**dict(zip(("language", "domain"), key, strict=False)), "documents": count, "bytes": volume, "tokens": tokens,
         "bytes_per_token": round(volume / tokens, 3), "tokens_per_word": round(tokens / max(words, 1), 3)}
        for key, (count, volume, tokens, words) in sorted(rows.items())
    ]  # fmt: skip
    return {"by_domain": [row for row in found if "domain" in row], "by_language": [row for row in found if "domain" not in row],
            "round_trip": checked}  # fmt: skip
