"""The code task in other languages: every operation of each language that this machine has, and what the checker refuses."""

import json
import random

import pytest

from stages import sandbox, stage
from stages.stage import CuveeError
from stages.tasks import _languages, code


def present(language):
    try:
        _languages.toolchain(language)
        return sandbox.best_level() != "rlimits"
    except CuveeError:
        return False


@pytest.mark.parametrize("language", _languages.LANGUAGES)
def test_every_operation_gives_what_the_reference_gives(language, monkeypatch):
    """All operations in one program, so that compilers start once."""
    if not present(language):
        pytest.skip(f"no program for {language} here, or no namespaces to run it behind")
    own, rng = _languages.LANGUAGES[language], random.Random(0)
    sources, calls, wanted = [], [], []
    for number, (_, key, kind, result, reference) in enumerate(_languages.OPERATIONS):
        arguments = {"two_numbers": ["x", "y"], "text": ["s"], "list": ["items"]}[kind]
        seen = [own.variable.format(name=a) for a in arguments]
        body = own.bodies[key].format(a=seen[0], b=seen[-1], n=3, c="a")
        typed = "number" if kind == "two_numbers" else kind
        sources.append(_languages.write(language, f"f{number}", arguments, typed, result, body))
        for _ in range(3):
            values = code._input(rng, kind)
            calls.append(_languages.call(language, f"f{number}", values))
            wanted.append(reference(*values, 3, "a"))
    made = code.generate(random.Random(1), 2, [], code.Options(languages=[language]))
    assert _languages.results(language, ["\n".join(sources)], [calls]) == [wanted]
    if language in ("javascript", "perl", "ruby"):  # compilers would need more
        monkeypatch.setitem(sandbox.COMMAND_LIMITS, "seconds", 0.5)
    endless = {"javascript": "for(;;);", "perl": "1 while 1;", "ruby": "loop {}"}.get(language, "nonsense (")
    given = [made[0]["answer"], f"```{own.titles[1]}\n{endless}\n```", "no block", "```python\nprint(1)\n```"]
    assert code.verify_batch([made[0]] * 4, given) == [1.0, 0.0, -1.0, -1.0]


def test_generation_needs_no_interpreter_and_checking_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(_languages.shutil, "which", lambda name: None)
    _languages.toolchain.cache_clear()
    options = stage.parse(code.Options, {"languages": ["rust"]}, "options")
    made = code.generate(random.Random(0), 20, [], options)
    assert json.loads(json.dumps(made)) == made
    assert {p["check"]["written_in"] for p in made} == {"rust"} and all(
        "In Rust: " in p["messages"][0]["content"] for p in made
    )
    assert code.verify_batch(made[:1], ["no code"]) == [-1.0], "what needs no run needs no compiler"
    with pytest.raises(CuveeError, match="'rustc' is not on this machine's PATH; install it, or leave rust out"):
        code.verify(made[0], made[0]["answer"])
    _languages.toolchain.cache_clear()


def test_languages_mix_and_keep_their_order():
    languages = [name for name in ("python", "sql", "perl") if name in ("python", "sql") or present(name)]
    made = code.generate(random.Random(3), 30, [], code.Options(languages=languages))
    answers = [p["answer"] for p in made]
    assert code.verify_batch(made, answers) == [1.0] * 30
    assert {p["check"].get("written_in", "python") for p in made} == set(languages)
    half = [a if i % 2 else "none" for i, a in enumerate(answers)]
    assert code.verify_batch(made, half) == [1.0 if i % 2 else -1.0 for i in range(30)]


def test_blocks_are_found_by_their_language():
    text = "```text\nno\n```\n```C++\nx\n```\n```cpp\ny\n```"
    assert code.code_block(text, "cpp") == "x\n" and code.code_block("```\nz\n```", "java") == "z\n"
    assert (
        code.code_block("```java\nz\n```", "javascript") is None
        and code.code_block("```js\nz\n```", "javascript") == "z\n"
    )
