"""The renderer: the bytes of the tokenizer's own chat template, and a mask on the assistant's tokens and no others."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stages.chat.messages import message as checked
from stages.chat.read import read
from stages.chat.render import MaskError, preview, render, render_row, response
from stages.chat.template import BOS, END_OF_TURN, PAD, SPECIAL_TOKENS, TEMPLATE, UNK, special
from stages.rollout._collect import answer_ids
from stages.stage import CuveeError

TEXTS = ["Hello, what is 3 + 4? The answer is 7.", "def f(x):\n    return x + 3\n", "月曜日 понедельник übrig", " spaces  "] * 9


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer for each template."""
    found = {}
    for name in TEMPLATE:
        own = special(name)
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=list(own.tokens), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
        core.train_from_iterator(TEXTS, trainer)
        found[name] = PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token=own.bos, eos_token=own.end_of_turn, pad_token=own.pad, unk_token=own.unk
        )
    return found


def use(tokenizer, name, tmp_path):
    """The tokenizer as a user gets it: with the template saved in its folder and read back."""
    tokenizer[name].chat_template = TEMPLATE[name]
    tokenizer[name].save_pretrained(tmp_path)
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
    assert [tokenizer["compact"].convert_tokens_to_ids(t) for t in SPECIAL_TOKENS] == list(range(20))
    assert SPECIAL_TOKENS[0] == PAD and SPECIAL_TOKENS[5] == BOS and SPECIAL_TOKENS[1] == UNK
    assert tokenizer["chatml"].convert_tokens_to_ids("<|im_end|>") == tokenizer["chatml"].eos_token_id == 2


@pytest.mark.parametrize("name", sorted(TEMPLATE))
def test_same_bytes_as_transformers_and_exact_mask(tokenizer, name, tmp_path):
    tokenizer = use(tokenizer, name, tmp_path)
    for messages in CONVERSATIONS:
        rendered = render(tokenizer, messages)
        if name != "chatml" or not any(m["content"][:1].isspace() for m in messages):
            assert rendered.ids == tokenizer.apply_chat_template(messages, return_dict=False)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(rendered.ids) == text and text.count(tokenizer.bos_token) == 1
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if name == "command_a":
            answers = [f"<|START_RESPONSE|>{a}<|END_RESPONSE|>" for a in answers]
        assert trained(tokenizer, rendered) == [a + tokenizer.eos_token for a in answers]
        assert trained(tokenizer, render(tokenizer, messages, turns="last")) == [answers[-1] + tokenizer.eos_token]


@pytest.mark.parametrize("name", sorted(TEMPLATE))
def test_generation_prompt_is_a_prefix_of_the_conversation(tokenizer, name, tmp_path):
    tokenizer = use(tokenizer, name, tmp_path)
    for messages in CONVERSATIONS:
        prompt = render(tokenizer, messages[:-1], generation=True)
        whole = render(tokenizer, messages)
        if name != "chatml" or not any(m["content"][:1].isspace() for m in messages):
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


def weather(city: str, days: int = 1):
    """
    The weather of the next days.

    Args:
        city: Name of the city.
        days: How many days.
    """


def calls(*arguments, ids=True, name="weather"):
    found = [{"type": "function", "function": {"name": name, "arguments": a}} for a in arguments]
    return [{"id": f"call_{i}", **call} for i, call in enumerate(found)] if ids else found


def tool(content, **more):
    return {"role": "tool", "content": content, **more}


CITY = {"city": 'São "Paulo"'}
TOOL_CONVERSATIONS = [  # messages, variables
    ([user("q"), assistant("", tool_calls=calls(CITY)), tool("rain", tool_call_id="call_0"), assistant("Rain.")], {"tools": [weather]}),
    ([system("Be brief."), user("q"), assistant("Two cities.", tool_calls=calls(CITY, {"city": "Rome", "days": 2})),
      tool("sun", tool_call_id="call_1"), tool({"sky": "grey"}, tool_call_id="call_0"), assistant("Both."),
      user("again"), assistant("", tool_calls=calls({})), tool("{}", tool_call_id="call_0"), assistant("No.")], {"tools": [weather]}),
    # Hugging Face's own form has neither ids nor tool_call_id.
    ([user("q"), assistant("", tool_calls=calls(CITY, {}, ids=False)), tool("a", name="weather"), tool("b", name="weather"),
      assistant("ok")], {"tools": [weather]}),
    ([user("q"), assistant("", tool_calls=calls('{"city": "Rome"}')), tool("x"), assistant("from a string")], {"tools": [weather]}),
]
DOCUMENT_CONVERSATIONS = [
    ([user("q"), assistant("<co>chunk</co: 0:[1]>"), user("and?"), assistant("no")], {"documents": [{"content": "pdf"}, {"title": "t", "text": "é"}]}),
    ([system("s"), user("q"), assistant("", tool_calls=calls(CITY)), tool("rain"), assistant("Rain.")],
     {"tools": [weather], "documents": [{"data": {"snippet": "x"}}], "safety_mode": "STRICT"}),
]


@pytest.mark.parametrize("name", sorted(TEMPLATE))
def test_tools_and_documents_render_as_in_transformers(tokenizer, name, tmp_path):
    tokenizer = use(tokenizer, name, tmp_path)
    for messages, variables in TOOL_CONVERSATIONS + DOCUMENT_CONVERSATIONS * (name != "chatml"):
        rendered = render(tokenizer, messages, **variables)
        theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True, **variables)
        assert rendered.ids == theirs["input_ids"]
        assert rendered.mask == theirs["assistant_masks"]
        assert tokenizer.decode(rendered.ids) == tokenizer.apply_chat_template(messages, tokenize=False, **variables)
        assert len(trained(tokenizer, rendered)) == sum(m["role"] == "assistant" for m in messages)
        row = {"id": "r", "messages": messages, **variables}
        assert render_row(tokenizer, row) == rendered
        for i, message in enumerate(messages):  # what is sampled from is the beginning of what is trained on
            if message["role"] == "assistant":
                prompt = render(tokenizer, messages[:i], generation=True, **variables).ids
                assert prompt == rendered.ids[: len(prompt)] and rendered.mask[len(prompt) - 1 :][:2] == [0, 1]


@pytest.mark.parametrize("name", sorted(TEMPLATE))
def test_what_was_written_is_read_back(tokenizer, name, tmp_path):
    tokenizer = use(tokenizer, name, tmp_path)
    plain = [([user("q"), assistant("a\n b", **more)], {}) for more in ({}, {"thinking": "hm"} if name != "chatml" else {})]
    for messages, variables in plain + TOOL_CONVERSATIONS:
        rendered = render(tokenizer, messages, **variables)
        number = 0
        for text, written in zip(trained(tokenizer, rendered), [m for m in messages if m["role"] == "assistant"], strict=True):
            expected = {k: v for k, v in written.items() if k != "tool_calls"}
            if written.get("tool_calls"):
                made = [c["function"] | ({"arguments": json.loads(a)} if isinstance(a := c["function"]["arguments"], str) else {})
                        for c in written["tool_calls"]]  # fmt: skip
                ids = [{} if name == "chatml" else {"id": str(number + i)} for i in range(len(made))]
                expected["tool_calls"] = [{"type": "function", **own, "function": f} for own, f in zip(ids, made, strict=True)]
                number += len(made)
                if name != "chatml":  # what is said before a call is thought
                    expected |= {"content": ""} | ({"thinking": written["content"]} if written["content"] else {})
            assert read(text) == expected
            assert checked(read(text) | {"content": read(text)["content"] or "x"})["role"] == "assistant"


def test_what_is_no_call_stays_text():
    for text in ('<|START_ACTION|>[{"tool_name": 1}]<|END_ACTION|>', "<|START_ACTION|>{<|END_ACTION|>", "<|START_ACTION|>[",
                 "<tool_call>\n[1]\n</tool_call>"):  # fmt: skip
        found = read(text + END_OF_TURN + "never read")
        assert "tool_calls" not in found and found["content"] == text.replace("<|START_ACTION|>", "").replace("<|END_ACTION|>", "")


def test_command_a_writes_tool_turns_as_the_reference(tokenizer, tmp_path):
    """The turns of melody's tests/templating/cmd3/one_hop_with_tools_and_documents_citation_quality_on and of
    thinking_empty_val, byte by byte."""
    tokenizer = use(tokenizer, "command_a", tmp_path)
    turn, system_turn = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>"
    text = tokenizer.apply_chat_template(AGENT[:3], tokenize=False, tools=TOOLS, documents=DOCUMENTS)
    lines = [f'            "{i}": {{"reminder_id": "{r["reminder_id"]}", "task": "{r["task"]}", "due_date": "{r["due_date"]}", "status": "pending"}}'
             for i, r in enumerate(REMINDERS)]  # fmt: skip
    assert text.split("<|USER_TOKEN|>")[1] == (
        f"Can you check if I have any reminders for the week?{END_OF_TURN}{turn}<|START_THINKING|>I will look through the document to "
        'address the users needs.<|END_THINKING|><|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "direct-injected-document", '
        f'"parameters": {{}}}}\n]<|END_ACTION|>{END_OF_TURN}{system_turn}<|START_TOOL_RESULT|>[\n    {{\n        "tool_call_id": "0",\n'
        '        "results": {\n            "0": {"content": "pdf chunk 1"},\n            "1": {"content": "pdf chunk 2"}\n        },\n'
        f'        "is_error": null\n    }}\n]<|END_TOOL_RESULT|>{END_OF_TURN}{turn}<|START_THINKING|>I will use the GetReminders tool to '
        'check if the user has any reminders.<|END_THINKING|><|START_ACTION|>[\n    {"tool_call_id": "1", "tool_name": "GetReminders", '
        f'"parameters": {{}}}}\n]<|END_ACTION|>{END_OF_TURN}{system_turn}<|START_TOOL_RESULT|>[\n    {{\n        "tool_call_id": "1",\n'
        '        "results": {\n' + ",\n".join(lines) + '\n        },\n        "is_error": null\n    }\n]<|END_TOOL_RESULT|>' + END_OF_TURN
    )
    thinking = [{"type": "thinking", "thinking": ""}, {"type": "text", "text": "Didn't actually think"}]
    text = tokenizer.apply_chat_template([user("What is 2 + 2?"), assistant(thinking), user("Think again")], tokenize=False)
    assert f"{turn}<|START_THINKING|><|END_THINKING|><|START_RESPONSE|>Didn't actually think<|END_RESPONSE|>{END_OF_TURN}" in text
    text = tokenizer.apply_chat_template([system("s"), user("q")], tokenize=False, response_format={"type": "json_object", "schema": {"a": 1}})
    assert (
        "\ns\nWhen generating JSON objects, do not generate block markers. Generate an object directly without prefixing with "
        "```json. Return only the JSON and nothing else.\nYour output should adhere to the following json schema:\n"
        f'{{"a": 1}}{END_OF_TURN}'
    ) in text


@pytest.mark.parametrize("name", TEMPLATE)
def test_an_answer_ends_where_a_sampled_one_ends(tokenizer, name, tmp_path):
    """ChatML writes a newline after the end of the turn, which no policy samples."""
    tokenizer = use(tokenizer, name, tmp_path)
    row = {"messages": [user("q"), assistant("a"), user("What is 3 + 4?")]}
    ids = answer_ids(tokenizer, row, "7")
    assert "7" in tokenizer.decode(ids) and ids[-1] == tokenizer.eos_token_id
    whole = render_row(tokenizer, row, "7").ids
    start = len(whole) - len(ids) - (name == "chatml")
    assert whole[start : start + len(ids)] == ids


def test_chatml_has_the_bytes_of_qwen(tokenizer, tmp_path):
    """What Qwen2.5's published template writes for these messages, our BOS before it."""
    tokenizer = use(tokenizer, "chatml", tmp_path)
    messages = [system("Be brief."), user("q"), assistant("Look.", tool_calls=calls({"city": "Rome"}, {"city": "Oslo"})),
                tool("sun"), tool("rain"), assistant("Both.")]  # fmt: skip
    text = tokenizer.apply_chat_template(messages, tokenize=False, tools=TOOLS[:1], add_generation_prompt=True)
    assert text == (
        "<|endoftext|><|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "GetReminders", "description": "Get a list of reminders.", "parameters": '
        '{"type": "object", "properties": {}, "required": []}}}\n</tools>\n\nFor each function call, return a json object with '
        "function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n<|im_start|>user\nq<|im_end|>\n'
        '<|im_start|>assistant\nLook.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n<|im_start|>user\n'
        "<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nBoth.<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = tokenizer.apply_chat_template([user("q")], tokenize=False, add_generation_prompt=True)
    assert plain == ("<|endoftext|><|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
                     "<|im_start|>assistant\n")  # fmt: skip


def test_compact_tools(tokenizer, tmp_path):
    tokenizer = use(tokenizer, "compact", tmp_path)
    messages = [user("q"), assistant("Look.", tool_calls=calls(CITY, {})), tool("sun"), tool([{"a": 1}, "b"]), assistant("ok")]
    rendered = render(tokenizer, messages, tools=TOOLS[:1], documents=[{"text": "d"}])
    turn = "<|START_OF_TURN_TOKEN|>"
    assert tokenizer.decode(rendered.ids) == (
        f'{BOS}{turn}<|SYSTEM_TOKEN|>{{"name": "GetReminders", "description": "Get a list of reminders.", "parameters": {{"type": "object", '
        f'"properties": {{}}, "required": []}}}}{END_OF_TURN}{turn}<|USER_TOKEN|>q{END_OF_TURN}{turn}<|SYSTEM_TOKEN|><|START_TOOL_RESULT|>\n'
        f'{{"tool_call_id": "0", "results": [{{"text": "d"}}]}}<|END_TOOL_RESULT|>{END_OF_TURN}{turn}<|CHATBOT_TOKEN|><|START_THINKING|>Look.'
        '<|END_THINKING|><|START_ACTION|>\n{"tool_call_id": "1", "tool_name": "weather", "parameters": {"city": "São \\"Paulo\\""}}\n'
        f'{{"tool_call_id": "2", "tool_name": "weather", "parameters": {{}}}}<|END_ACTION|>{END_OF_TURN}{turn}<|SYSTEM_TOKEN|>'
        '<|START_TOOL_RESULT|>\n{"tool_call_id": "1", "results": ["sun"]}\n{"tool_call_id": "2", "results": [{"a": 1}, "b"]}'
        f"<|END_TOOL_RESULT|>{END_OF_TURN}{turn}<|CHATBOT_TOKEN|>ok{END_OF_TURN}"
    )


def test_refusals(tokenizer, tmp_path):
    chatml = use(tokenizer, "chatml", tmp_path / "chatml")
    for text in ("<|im_end|>", "<|endoftext|>"):
        with pytest.raises(CuveeError, match="special token"):
            render(chatml, [user(text), assistant("a")])
    assert render(chatml, [user("<|USER_TOKEN|>"), assistant("no token of this one")]).ids
    with pytest.raises(CuveeError, match="takes no documents"):
        render(chatml, [user("q"), assistant("a")], documents=DOCUMENTS)
    compact = use(tokenizer, "compact", tmp_path)
    with pytest.raises(MaskError, match="chats.jsonl:7: messages: no token would be trained on"):
        render_row(compact, {"id": "chats.jsonl:7", "messages": [user("q")]})
    with pytest.raises(CuveeError, match="special token <|USER_TOKEN|>".replace("|", r"\|")):
        render(compact, [user("<|USER_TOKEN|>"), assistant("a")])
    with pytest.raises(CuveeError, match="special token"):
        render(compact, [user("q"), assistant("a")], tools=[{"function": {"name": "<BOS_TOKEN>"}}])
    for messages in ([{"role": "judge", "content": "x"}], [user([{"type": "text", "text": "x"}])], [system(["x"]), user("q")]):
        with pytest.raises(CuveeError, match="compact chat template takes"):
            render(compact, messages, generation=True)
    command_a = use(tokenizer, "command_a", tmp_path)
    for messages, reason in (
        ([user("q"), {"role": "tool", "tool_call_id": "9", "content": "x"}], "call 9, which the assistant did not make"),
        ([user("q"), assistant("", tool_calls=calls({})), tool("x"), tool("y")], "call 1, which the assistant did not make"),
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
    assert response("<|START_THINKING|>no<|END_THINKING|>yes") == "yes", "as compact writes it"
    assert response("<|START_THINKING|>so it is 7") == "", "cut off before it answered"
    assert response('<|START_THINKING|>hm<|END_THINKING|><|START_ACTION|>\n{"a": 1}<|END_ACTION|>') == 'hm\n{"a": 1}'
    assert response("plain <|im_end|>\n<|im_start|>user") == "plain"
    assert preview(compact, render(compact, [user("q"), assistant("月曜日")])).endswith(f"[[月曜日{END_OF_TURN}]]"), "bytes of several tokens"


@pytest.mark.parametrize("name", sorted(TEMPLATE))
def test_a_trained_tokenizer_has_the_tokens_of_its_template(name, tmp_path):
    """As the stage data.tokenizer saves it: documents begin with BOS, chats end with the end of the turn."""
    from stages.data import tokenizer as stage

    stage.save(stage.train(TEXTS, 600, 2, special(name)), name, tmp_path)
    found, own = AutoTokenizer.from_pretrained(tmp_path), special(name)
    assert found("x")["input_ids"][0] == found.bos_token_id and found.eos_token == own.end_of_turn
    assert [found.convert_tokens_to_ids(token) for token in own.tokens] == list(range(len(own.tokens)))
    rendered = render(found, [user("Hello"), assistant("What is 3 + 4?")])
    assert rendered.ids[0] == found.bos_token_id and found.decode(rendered.ids).count(own.bos) == 1
    assert [i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m][-1] == found.eos_token_id
    identity = {n: stage.external(stage.Config(template=n))["template"] for n in TEMPLATE}
    assert len(set(identity.values())) == len(TEMPLATE)
