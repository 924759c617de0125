"""The renderer: the bytes of the tokenizer's own chat template, and a mask on the assistant's tokens and no others."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stages.chat.render import preview, render, response
from stages.chat.template import BOS, END_OF_TURN, PAD, SPECIAL_TOKENS, TEMPLATE, UNK
from stages.stage import CuveeError

TEXTS = ["Hello, what is 3 + 4? The answer is 7.", "def f(x):\n    return x + 3\n", "月曜日 понедельник übrig", " spaces  "] * 9


@pytest.fixture(scope="module", params=[False, True], ids=["exact-offsets", "trimmed-offsets"])
def tokenizer(request, tmp_path_factory):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    if request.param:
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=END_OF_TURN, pad_token=PAD, unk_token=UNK
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def use(tokenizer, name, tmp_path):
    """The tokenizer as a user gets it: with the template saved in its folder and read back."""
    tokenizer.chat_template = TEMPLATE[name]
    tokenizer.save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


CONVERSATIONS = [
    [user("Hello"), assistant("What is 3 + 4?")],
    [user("Hello"), assistant(" spaces first\n"), user("x"), assistant("  "), user("y"), assistant("7")],
    [system("Be brief."), user("月曜日"), assistant("понедельник"), user("é {{ x }} {% if %}"), assistant("```python\nx\n```")],
    [system(""), user("An empty system"), assistant("übrig")],
    [system("Safety mode: STRICT"), user("q"), assistant("a")],
    [system("Safety mode: NONE\nBe brief."), user(""), assistant("a\n\n")],
]


def trained(tokenizer, rendered):
    """The texts of the masked spans."""
    spans, inside = [], False
    for token, mask in zip(rendered.ids, rendered.mask, strict=True):
        if mask:
            spans = spans if inside else [*spans, []]
            spans[-1].append(token)
        inside = bool(mask)
    return [tokenizer.decode(span) for span in spans]


def test_ids_of_special_tokens(tokenizer):
    assert [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS] == list(range(20))
    assert SPECIAL_TOKENS[0] == PAD and SPECIAL_TOKENS[5] == BOS and SPECIAL_TOKENS[1] == UNK


@pytest.mark.parametrize("name", sorted(TEMPLATE))
def test_same_bytes_as_transformers_and_exact_mask(tokenizer, name, tmp_path):
    tokenizer = use(tokenizer, name, tmp_path)
    for messages in CONVERSATIONS:
        rendered = render(tokenizer, messages)
        assert rendered.ids == tokenizer.apply_chat_template(messages, return_dict=False)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(rendered.ids) == text and text.count(BOS) == 1
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if name == "command_a":
            answers = [f"<|START_RESPONSE|>{a}<|END_RESPONSE|>" for a in answers]
        assert trained(tokenizer, rendered) == [a + END_OF_TURN for a in answers]


@pytest.mark.parametrize("name", sorted(TEMPLATE))
def test_generation_prompt_is_a_prefix_of_the_conversation(tokenizer, name, tmp_path):
    tokenizer = use(tokenizer, name, tmp_path)
    for messages in CONVERSATIONS:
        prompt = render(tokenizer, messages[:-1], generation=True)
        whole = render(tokenizer, messages)
        assert prompt.ids == tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert whole.ids[: len(prompt.ids)] == prompt.ids and not any(prompt.mask)
        assert whole.mask[len(prompt.ids)] == 1 and whole.mask[len(prompt.ids) - 1] == 0


def test_compact_is_compact(tokenizer, tmp_path):
    tokenizer = use(tokenizer, "compact", tmp_path)
    turn = "<|START_OF_TURN_TOKEN|>"
    bare = f"{BOS}{turn}<|USER_TOKEN|>q{END_OF_TURN}{turn}<|CHATBOT_TOKEN|>"
    for extra in ({}, {"safety_mode": "CONTEXTUAL"}):
        assert tokenizer.decode(render(tokenizer, [user("q")], generation=True, **extra).ids) == bare
    strict = tokenizer.decode(render(tokenizer, [user("q")], generation=True, safety_mode="STRICT").ids)
    assert strict == bare.replace(BOS, f"{BOS}{turn}<|SYSTEM_TOKEN|>Safety mode: STRICT{END_OF_TURN}")
    assert strict == tokenizer.decode(render(tokenizer, [system("Safety mode: STRICT"), user("q")], generation=True).ids)


TOOLS = [
    {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}
    for name, about, parameters in (
        ("GetReminders", "Get a list of reminders.", {"type": "object", "properties": {}, "required": []}),
        ("DeleteReminder", "Delete a reminder.",
         {"type": "object", "properties": {"reminder_id": {"type": "string"}}, "required": ["reminder_id"]}),
    )
]  # fmt: skip
DOCUMENTS = [{"content": "pdf chunk 1"}, {"content": "pdf chunk 2"}]
REMINDERS = [
    {"reminder_id": i, "task": task, "due_date": f"2023-09-{day} 23:59:59", "status": "pending"}
    for i, task, day in (("59-80bc", "Buy groceries", 11), ("14-579a", "Call Amy", 11),
                         ("5b-dd80", "finish your report", 15), ("20-d9ca", "call your mom", 17))
]  # fmt: skip
AGENT = [
    user("Can you check if I have any reminders for the week?"),
    assistant(
        "I will use the GetReminders tool to check if the user has any reminders.",
        tool_calls=[{"id": "call_x", "type": "function", "function": {"name": "GetReminders", "arguments": {}}}],
    ),
    {"role": "tool", "tool_call_id": "call_x", "content": REMINDERS},
    assistant(
        "Some reminders include <co>'Call Amy'</co: 1:[1]> and <co>'Call your mom'</co: 1:[3]>, "
        "also you have <co>pdf chunks</co: 0:[0,1]>",
        thinking="I will use the results such as <co>'Call your mom'</co: 1:[0,1,2,3]> in my response",
    ),
    assistant("<co>Testing</co: 0:[0]> without thinking works"),
]


# Lengths in characters of what Cohere's own renderer (cohere-ai/melody, tests/templating/cmd3) gives for these inputs.
@pytest.mark.parametrize(
    ("messages", "variables", "length"),
    [
        (AGENT, {"tools": TOOLS, "documents": DOCUMENTS}, 9675),
        (AGENT[:3], {"tools": TOOLS, "documents": DOCUMENTS}, 9193),
        (AGENT[:1], {"reasoning": True}, 3232),
        (AGENT[:1], {"safety_mode": "NONE"}, 2271),
        ([system("Safety mode: STRICT"), *AGENT[:1]], {}, 2660),
        ([system("talk like a pirate"), *AGENT[:1]], {}, 2850),
    ],
)
def test_command_a_has_the_length_of_the_reference(tokenizer, tmp_path, messages, variables, length):
    tokenizer = use(tokenizer, "command_a", tmp_path)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
    assert len(text) == length
    ids = render(tokenizer, messages, generation=True, **variables).ids
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **variables)


def test_command_a_trains_on_calls_and_answers_but_not_on_results_or_the_documents_turn(tokenizer, tmp_path):
    tokenizer = use(tokenizer, "command_a", tmp_path)
    calls = [{"id": i, "type": "function", "function": {"name": "DeleteReminder", "arguments": {"reminder_id": i}}}
             for i in ("a", "b")]  # fmt: skip
    messages = [user("q"), assistant("", tool_calls=calls), {"role": "tool", "tool_call_id": "b", "content": "gone"},
                {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "kept"}]},
                assistant("done", thinking="hm")]  # fmt: skip
    rendered = render(tokenizer, messages, tools=TOOLS, documents=DOCUMENTS)
    text = tokenizer.decode(rendered.ids)
    assert text.count("<|START_TOOL_RESULT|>[") == 2 and '"tool_call_id": "2",\n        "results": {\n            "0": {"content": "gone"}' in text
    assert trained(tokenizer, rendered) == [
        '<|START_ACTION|>[\n    {"tool_call_id": "1", "tool_name": "DeleteReminder", "parameters": {"reminder_id": "a"}},\n'
        '    {"tool_call_id": "2", "tool_name": "DeleteReminder", "parameters": {"reminder_id": "b"}}\n]<|END_ACTION|>' + END_OF_TURN,
        f"<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>done<|END_RESPONSE|>{END_OF_TURN}",
    ]


def test_refusals(tokenizer, tmp_path):
    compact = use(tokenizer, "compact", tmp_path)
    with pytest.raises(CuveeError, match="no token would be trained on"):
        render(compact, [user("q")])
    with pytest.raises(CuveeError, match="special token <|USER_TOKEN|>".replace("|", r"\|")):
        render(compact, [user("<|USER_TOKEN|>"), assistant("a")])
    for messages, variables in (([{"role": "tool", "content": "x"}], {}), ([user("q")], {"tools": TOOLS})):
        with pytest.raises(CuveeError, match="compact chat template takes"):
            render(compact, messages, generation=True, **variables)
    command_a = use(tokenizer, "command_a", tmp_path)
    for messages, reason in (
        ([user("q"), {"role": "tool", "tool_call_id": "9", "content": "x"}], "call 9, which the assistant did not make"),
        ([system("Safety mode: LOUD"), user("q")], "safety_mode LOUD is not known"),
        ([{"role": "judge", "content": "x"}], "role judge is not known"),
    ):
        with pytest.raises(CuveeError, match=reason):
            render(command_a, messages, generation=True)


def test_preview_and_response(tokenizer, tmp_path):
    compact = use(tokenizer, "compact", tmp_path)
    assert preview(compact, render(compact, CONVERSATIONS[0])).endswith(f"[[What is 3 + 4?{END_OF_TURN}]]")
    assert response(f"<|START_THINKING|>no<|END_THINKING|><|START_RESPONSE|> yes <|END_RESPONSE|>{END_OF_TURN}") == "yes"
    assert response(f"plain {END_OF_TURN} and more") == "plain"
