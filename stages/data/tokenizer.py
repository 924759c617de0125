"""A byte-level BPE tokenizer from the corpus: digits one by one, the recipe's special tokens and chat template."""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from stages.data import corpus
from stages.data.text import units
from stages.stage import Artifact, ConfigError, Context, CuveeError, Input, Kind, option, unknown

VERSION = "1"
INPUTS = {"corpus": Input(Kind.CORPUS), "prompts": Input(Kind.PROMPTS, many=True, optional=True)}
OUTPUT = Kind.TOKENIZER
BYTES = 256
# What a corpus may lack and every tokenizer must carry: other scripts, emoji, runs of white space, numbers, controls.
STRESS = "naïve 汉字 ไทย हिन्दी עברית 한국어 👩‍🔬\n\n\t    indented  \r\n1234567890 ²³ ½ e\u0301 \x00\x7f\ufeff <|almost|>"


@dataclass
class Config:
    vocab_size: int = option(256_000, "tokens, the special ones included")
    template: str = option("command_a", "chat template: a .jinja file of stages/chat")
    sample_bytes: int = option(10_000_000_000, "text to train on, in bytes; the whole corpus where it is smaller")
    balance: float = option(0.5, "a domain and language gets a share ~ bytes to this power; 1 = as in the corpus")
    min_frequency: int = option(2, "fewest occurrences of a pair that becomes a token")
    seed: int = option(0, "decides which documents are in the sample")


def check(config: Config, inputs: dict[str, Any]) -> None:
    """Raises ConfigError for a template that does not exist or a vocabulary too small for bytes and special tokens."""
    from stages.chat.template import SPECIAL_TOKENS, TEMPLATE

    if config.template not in TEMPLATE:
        raise ConfigError(f"template: {unknown(config.template, sorted(TEMPLATE))}")
    least = BYTES + len(SPECIAL_TOKENS)
    if config.vocab_size < least:
        raise ConfigError(f"vocab_size: {config.vocab_size} is too small for {BYTES} bytes and "
                          f"{len(SPECIAL_TOKENS)} special tokens; give at least {least}")


def run(config: Config, inputs: dict[str, Any], out: Path, ctx: Context) -> dict[str, float]:
    """Writes a Hugging Face tokenizer folder and fertility.json. Raises CuveeError when a text does not survive it."""
    groups = _groups(inputs["corpus"], inputs.get("prompts") or {})
    sample = balanced(groups, config.sample_bytes, config.balance, config.seed)
    ctx.log(f"training on {len(sample)} of {sum(map(len, groups.values()))} documents")
    tokenizer = train(sample, config.vocab_size, config.min_frequency)
    save(tokenizer, config.template, out)
    rows = fertility(tokenizer, inputs["corpus"].path)
    (out / "fertility.json").write_text(json.dumps(rows, indent=1) + "\n")
    size, tokens = (sum(row[key] for row in rows) for key in ("bytes", "tokens"))
    return {"vocab_size": tokenizer.get_vocab_size(), "bytes_per_token": size / tokens}


def _groups(source: Artifact, prompts: dict[str, Artifact]) -> dict[tuple[str, str], list[str]]:
    """Training texts by domain and language; the prompts of a domain are a group of their own."""
    groups: dict[tuple[str, str], list[str]] = {}
    for document in corpus.documents(source.path, "train"):
        groups.setdefault((document["domain"], document["language"]), []).append(document["text"])
    for name, artifact in sorted(prompts.items()):
        groups["instructions", name] = [
            "\n".join([*(turn["content"] for turn in prompt["messages"]), prompt["answer"]])
            for prompt in corpus.prompts(artifact.path, "train")
        ]
    return groups


def balanced(groups: dict[tuple[str, str], list[str]], budget: int, power: float, seed: int) -> list[str]:
    """Texts of at most about `budget` bytes: a group gets a share ~ bytes^power, or all of it where that is less.

    What small groups leave over goes to the larger ones, in the same proportion.
    """
    sizes = {group: sum(len(text.encode()) for text in texts) for group, texts in groups.items() if any(texts)}
    left, shares = budget, dict.fromkeys(sizes, 0.0)
    waiting = sorted(sizes, key=lambda group: (sizes[group] ** (1 - power), group))  # first those that take the least
    for i, group in enumerate(waiting):
        total = sum(sizes[other] ** power for other in waiting[i:])
        shares[group] = min(sizes[group], left * sizes[group] ** power / total)
        left -= shares[group]
    sample = []
    for group in sorted(sizes):
        texts = groups[group]
        if shares[group] < sizes[group]:
            texts = sorted(texts, key=lambda text: sha256(f"{seed}:{text}".encode()).digest())
        taken = 0
        for text in texts:
            if taken >= shares[group]:
                break
            sample.append(text)
            taken += len(text.encode())
    return sample


def train(texts: list[str], vocab_size: int, min_frequency: int) -> Any:
    """A `tokenizers.Tokenizer`. Special tokens have the first ids; every byte has a token, so nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from stages.chat.template import BOS, SPECIAL_TOKENS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer, len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save(tokenizer: Any, template: str, out: Path) -> None:
    """The folder that `AutoTokenizer.from_pretrained` loads."""
    from transformers import PreTrainedTokenizerFast

    from stages.chat.template import BOS, END_OF_TURN, PAD, TEMPLATE, UNK

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=END_OF_TURN, pad_token=PAD, unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = TEMPLATE[template]
    wrapped.save_pretrained(out)
    # The name that every release of transformers and every server knows; this release would write its own class's.
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def fertility(tokenizer: Any, path: Path) -> list[dict[str, Any]]:
    """Rows by domain and language: documents, bytes, tokens, bytes_per_token, tokens_per_word, on the held-out text.

    Raises CuveeError when a text does not come back from its tokens byte by byte.
    """
    from stages.chat.template import SPECIAL_TOKENS

    tokenizer.encode_special_tokens = True  # a special token's name inside a text is text
    rows: dict[tuple[str, str], list[int]] = {}
    stress = {"id": "stress test", "text": STRESS + "".join(SPECIAL_TOKENS), "domain": "", "language": ""}
    documents = [*corpus.documents(path, "heldout"), stress]
    encodings = tokenizer.encode_batch_fast([document["text"] for document in documents], add_special_tokens=False)
    for document, encoding in zip(documents, encodings, strict=True):
        text, ids = document["text"], encoding.ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise CuveeError(f"data.tokenizer: {document['id']} does not come back from its tokens as it was; "
                             "this is a defect of the tokenizer's settings, not of your text")
        if document is not stress:
            row = rows.setdefault((document["domain"], document["language"]), [0, 0, 0, 0])
            for i, count in enumerate((1, len(text.encode()), len(ids), len(units(text)))):
                row[i] += count
    tokenizer.encode_special_tokens = False
    return [
        {"domain": domain, "language": language, "documents": documents, "bytes": size, "tokens": tokens,
         "bytes_per_token": round(size / tokens, 3), "tokens_per_word": round(tokens / max(words, 1), 3)}
        for (domain, language), (documents, size, tokens, words) in sorted(rows.items())
    ]
