"""What no file may do, read from the source of every file: a new one is held to it by being there."""

import ast
import re
from pathlib import Path

import pytest

from flows.config import compose
from stages.stage import ConfigError

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("stages", "flows", "infra") for path in (ROOT / folder).rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
# The file and why it may: nothing that comes from outside.
PICKLES = {"stages/tasks/multilingual.py": "names of languages from Babel's own installed files",
           "stages/store/mirror.py": "an unpickler that builds nothing: it only names what a checkpoint would"}
RUNS_TEXT = {"stages/_warden.py": "the inside of the sandbox", "stages/tasks/_algorithms.py": "our own text",
             "stages/tasks/code.py": "our own text"}


def calls(path):
    """(dotted name, call) of every call in a file."""
    return [(ast.unparse(node.func), node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def keyword(call, name):
    return next((ast.unparse(one.value) for one in call.keywords if one.arg == name), None)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_from_outside_is_run(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    assert name_of(path) in PICKLES or not imported & UNPICKLERS
    for called, call in calls(path):
        last = called.rpartition(".")[2]
        if called == "torch.load":
            assert keyword(call, "weights_only") == "True", f"line {call.lineno}: torch.load without weights_only=True"
        assert keyword(call, "allow_pickle") in (None, "False"), f"line {call.lineno}"
        assert keyword(call, "trust_remote_code") in (None, "False"), f"line {call.lineno}"
        assert keyword(call, "shell") in (None, "False"), f"line {call.lineno}: a shell"
        assert called not in ("os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"), f"line {call.lineno}"
        assert last != "extractall" or keyword(call, "filter") == "'data'", f"line {call.lineno}: an archive may escape"
        if called in ("eval", "exec"):
            assert name_of(path) in RUNS_TEXT, f"line {call.lineno}: {called}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_listens_off_loopback(path):
    text = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    assert not {"0.0.0.0", "::", "[::]"} & {value for value in text if isinstance(value, str)}
    for called, call in calls(path):
        if called.endswith((".bind", "create_server", "start_server", "Server")) and call.args:
            first = call.args[0]
            if isinstance(first, ast.Tuple) and isinstance(first.elts[0], ast.Constant):
                assert first.elts[0].value in ("127.0.0.1", "localhost", "::1"), f"line {call.lineno}"


@pytest.mark.parametrize("override", ["+data._target_=os.system", "+_target_=os.system", "+model._target_=os.system",
                                      "++expert.math.sft._target_=os.system", "+recipe._target_=os.system"])
def test_a_target_is_refused(override, tmp_path):
    from flows.graph import Graph

    with pytest.raises(ConfigError):
        Graph(compose([override]))


def test_the_lock_names_what_the_constraints_do_with_hashes():
    pinned = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.MULTILINE)

    def versions(text):
        return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pinned.findall(text)}

    text = (ROOT / "requirements.lock").read_text()
    assert versions(text) == versions((ROOT / "constraints.txt").read_text()), "make it again with the command in its head"
    for entry in re.split(r"\n(?=[A-Za-z])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip()):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry
