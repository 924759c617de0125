"""The sandbox against what a program might do, at every level that this machine and user can run."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from stages import sandbox
from stages.sandbox import Program, best_level, run
from stages.stage import CuveeError

ROOT = Path(__file__).parents[2]


def working(level):
    if level == "bubblewrap" and (os.geteuid() == 0 or not shutil.which("bwrap")):
        return False
    try:
        return run([Program("", ["1"])], level=level)[0].values == ["1"]
    except CuveeError:
        return False


@pytest.fixture(params=sandbox.LEVELS)
def level(request):
    if not working(request.param):
        pytest.skip(f"level {request.param} does not run here")
    return request.param


def program(source, *calls):
    return Program(textwrap.dedent(source), list(calls))


def test_values_errors_and_order(level):
    good = program("def f(x):\n    return [x, 'é']", "f(1)", "f(1 / 0)", "f({2: 3})")
    outcomes = run([good, program("1 / 0", "1"), program("def f(:", "1"), program("import math", "math.pi"), good], level=level)
    assert outcomes[0].values == ["[1, 'é']", None, "[{2: 3}, 'é']"] and outcomes[0].status == "ok"
    assert "ZeroDivisionError" in outcomes[0].error and outcomes[4] == outcomes[0]
    assert [o.status for o in outcomes[1:4]] == ["error", "error", "ok"]
    assert "SyntaxError" in outcomes[2].error and outcomes[3].values == ["3.141592653589793"]
    assert run([], level=level) == []


def test_limits_of_time_memory_and_output(level):
    loop, nap, late = run(
        [
            program("while True: pass", "1"),
            program("import time\ntime.sleep(60)", "1"),
            program("def f(x):\n    while x: pass\n    return x", "f(0)", "f(1)", "f(0)"),
        ],
        {"seconds": 0.2, "wall_seconds": 1.0},
        level,
    )
    assert [o.status for o in (loop, nap, late)] == ["timeout"] * 3 and late.values[1:] == [None, None]
    bomb, hoard, deep, loud, louder, big = run(
        [
            program("x = bytearray(10 << 30)", "1"),
            program("x = []\nwhile True: x.append(bytearray(1 << 20))", "1"),
            program("import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self): return repr(self)", "A()"),
            program("print('x' * 10**8)", "1"),
            program("while True: print('x' * 1000)", "1"),
            program("open('big', 'wb').write(b'x' * (100 << 20))", "1"),
        ],
        level=level,
    )
    assert bomb.status == "error" and "MemoryError" in bomb.error
    assert hoard.status in ("error", "killed") and hoard.values == [None]
    assert deep.values == [None]
    assert loud.status == louder.status == "error" and 0 < len(louder.output) <= 1 << 16
    assert big.status == "error" and big.values == [None]


def test_no_processes_and_no_way_to_the_warden(level, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the warden's command line names this folder
    os.chmod(tmp_path, 0o755)
    alive = program("def f(): return 5", "f()")
    attacks = [
        program("import os\nwhile True: os.fork()", "1"),
        program("import threading\nt = threading.Thread(target=print)\nt.start()", "1"),
        program("import subprocess\nsubprocess.run(['/bin/true'])", "1"),
        program("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", "1"),
        program("import os\nos.killpg(0, 9)\n", "1"),
        program("import os\nos.kill(-1, 9)", "1"),
        program("import os\nos.closerange(0, 100)", "1"),
        program("import os\nos._exit(0)", "1"),
        program("import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.setsid()", "1"),
        program("import os\nos.write(3, b'[\"failed\", \"x\"]\\n[\"end\", \"\"]\\nnonsense\\n[1]\\n')\nos._exit(0)", "1"),
        program("raise SystemExit", "1"),
        program("raise KeyboardInterrupt", "1"),
        program("import builtins\nfor name in dir(builtins): setattr(builtins, name, None)", "1"),
    ]
    batch = [one for attack in attacks for one in (attack, alive)]
    outcomes = run(batch, level=level)
    assert all(o.status == "ok" and o.values == ["5"] for o in outcomes[1::2])
    for attack, outcome in zip(attacks[:3], outcomes[:6:2], strict=True):
        assert outcome.status == "error", (attack, outcome)
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in text(p)], "a process is left"
    assert not list(tmp_path.iterdir())


def text(path):
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_no_files_no_secrets_no_network(level, tmp_path, monkeypatch):
    os.chmod(tmp_path, 0o777)
    for parent in [p for p in tmp_path.parents if p.stat().st_uid == os.geteuid() and p.name.startswith("pytest-")]:
        os.chmod(parent, 0o755)
    (tmp_path / "secret").write_text("s3cret")
    os.chmod(tmp_path / "secret", 0o666)
    monkeypatch.setenv("TOKEN", "s3cret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcomes = run(
            [
                program(f"open({str(tmp_path / 'new')!r}, 'w').write('x')", "1"),
                program("", f"open({str(tmp_path / 'secret')!r}).read()"),
                program("import os", "dict(os.environ)", "os.listdir('.')", "os.environ.get('TOKEN')"),
                program(f"import socket\ns = socket.create_connection(('127.0.0.1', {port}), 1)", "1"),
                program("import urllib.request", f"urllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)"),
                program("open('left', 'w').write('x')\nimport os", "os.listdir('.')"),
                program("import os", "os.listdir('.')"),
                program("open(__import__('sys').base_prefix + '/evil', 'w')", "1"),
                program("import os\nos.mkdir('a')\nos.symlink('/etc', 'a/b')", "1"),
                program("import os", "os.listdir('.')", "os.getuid() == 0", "open('/etc/shadow').read()"),
            ],
            {"seconds": 2.0},
            level,
        )
    new, secret, environment, connect, url, left, clean, prefix, _, last = outcomes
    assert new.status == "error" and not (tmp_path / "new").exists()
    assert secret.values == [None] and "s3cret" not in str(outcomes)
    assert environment.values == ["{}", "[]", "None"]
    assert connect.status == "error" and url.values == [None]
    assert left.values == ["['left']"] and clean.values == ["[]"]
    assert prefix.status == "error" and not Path(sys.base_prefix, "evil").exists()
    assert last.values == ["[]", "False" if os.geteuid() == 0 else last.values[1], None]


def test_a_call_has_its_own_time(level):
    outcome = run([program("def f(x):\n    while x: pass\n    return x", "f(0)", "f(1)", "f(0)")], {"call_seconds": 0.2}, level)[0]
    assert outcome.values == ["0", None, "0"] and outcome.status == "ok" and "TimeoutError" in outcome.error


def test_queries_read_and_do_nothing_else(level):
    setup = "CREATE TABLE t(n INTEGER); INSERT INTO t VALUES (1), (2);"
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c"
    outcomes = run(
        [
            sandbox.Query("SELECT n, 'é' FROM t ORDER BY n", [setup, "CREATE TABLE t(n INTEGER)"]),
            *(sandbox.Query(attack, [setup]) for attack in (
                "DELETE FROM t", "ATTACH '/etc/passwd' AS x", "ATTACH 'new' AS x", "PRAGMA user_version", "VACUUM INTO 'new'",
                "SELECT load_extension('x')", "SELECT randomblob(1000000000)", endless, "no query", "SELECT 1; SELECT 2")),
            program("import sqlite3", "1 + 1"),
        ],
        {"call_seconds": 0.2}, level,
    )  # fmt: skip
    assert outcomes[0].values == ["[(1, 'é'), (2, 'é')]", "[]"]
    assert all(o.values == [None] and o.error for o in outcomes[1:-1]), outcomes
    assert outcomes[-1].values == ["2"]


@pytest.fixture
def walls():
    found = sandbox.best_level()
    if found == "rlimits" or not all(map(shutil.which, ("bash", "perl"))):
        pytest.skip("commands need namespaces or bubblewrap, and these tests bash and perl")
    return found


def command(name, text):
    return sandbox.Command({name: text}, [["bash" if name.endswith("sh") else "perl", name]])


def test_commands_run_in_steps_and_say_what_failed(walls):
    two = sandbox.Command({"a.sh": "echo 41 > n", "b.pl": "open F, 'n'; print 1 + <F>"}, [["bash", "a.sh"], ["perl", "b.pl"]])
    found = sandbox.run_commands([two, command("a.sh", "echo out; echo err >&2; exit 3"), sandbox.Command({}, [["/no/such"]]), two])
    assert found[0] == found[3] and found[0].status == "ok" and found[0].output == "42"
    assert found[1].status == "error" and found[1].output == "out\n" and "bash ended with status 3: err" in found[1].error
    assert found[2].status == "error" and "No such file" in found[2].error
    assert sandbox.run_commands([]) == []


def test_commands_have_limits_together(walls):
    name = f"bomb{os.getpid()}.sh"
    bomb, loop, huge, many, disk, loud = sandbox.run_commands(
        [
            command(name, "b() { b | b & }; b; wait; sleep 5"),
            command("a.pl", "while (1) {}"),
            command("a.pl", "my $x = 'a' x (10 << 30); print length $x"),
            command("a.pl", "for (1 .. 40) { if (!fork) { my $x = 'a' x (60 << 20); sleep 30 } } sleep 30"),
            command("a.sh", "for i in 1 2 3 4 5 6; do head -c 60M /dev/zero > f$i || exit 1; done"),
            command("a.sh", "yes"),
        ],
        limits={"seconds": 1, "wall_seconds": 4, "memory_mb": 300},
    )
    assert bomb.output == "" and not [p for p in Path("/proc").glob("[0-9]*/cmdline") if name in text(p)], "it ends, with all it started"
    assert loop.status == "timeout" or "status -9" in loop.error
    assert huge.status == "error" and huge.output == ""
    assert many.status == "killed"  # no process breaks a limit of its own, together they do
    assert disk.status == "error" and loud.status == "error" and len(loud.output) <= 1 << 15


def test_commands_see_no_files_no_network_no_other_process(walls, tmp_path):
    os.chmod(tmp_path, 0o755)
    (tmp_path / "secret").write_text("s3cret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        look, write, connect, kill = sandbox.run_commands([
            command("a.sh", f"cat {tmp_path}/secret /etc/passwd /etc/shadow /proc/1/environ; ls /home /root; id -u; env"),
            command("a.sh", f"echo x > /usr/bin/x; echo x > {tmp_path}/x; echo x > /etc/x; mkdir /tmp/../x; ls"),
            command("a.sh", f"echo x > /dev/tcp/127.0.0.1/{port} && echo through"),
            command("a.sh", "kill -9 -1; kill -9 1; kill -9 $PPID; echo alive"),
        ])  # fmt: skip
    assert "s3cret" not in str(look) and "root:x" not in str(look) and "TOKEN" not in look.output
    assert write.output == "a.sh\n" and not list(tmp_path.glob("x")) and not Path("/usr/bin/x").exists()
    assert connect.status == "error" and "through" not in connect.output
    assert kill.output == "alive\n"
    with pytest.raises(CuveeError, match="behind namespaces only, not at the level rlimits"):
        sandbox.run_commands([command("a.sh", "")], level="rlimits")


def test_no_way_out_of_the_root_directory():
    """A user namespace of its own would give a program the right to leave the folder that it takes for the root."""
    if best_level() != "namespaces":
        pytest.skip("the level namespaces does not run here")
    out = run([program("import ctypes", "ctypes.CDLL(None).unshare(0x10000000)", "__import__('os').listdir('/home')")])[0]
    assert out.values == ["-1", None]


FORBID = "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 21, 0, 0, 0); os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
ASK = '''
from stages import sandbox
print(sandbox.run([sandbox.Program("x = 1", ["x + 1"])])[0].values)
'''


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up the right to make namespaces")
def test_where_namespaces_are_forbidden_it_is_said_and_can_be_refused():
    """Root without CAP_SYS_ADMIN (21), as in most containers."""

    def ask(**environment):
        own = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment}
        return subprocess.run([sys.executable, "-c", FORBID, ASK], env=own, capture_output=True, text=True)

    said = ask()
    assert said.stdout == "['2']\n" and "this machine gives no namespaces" in said.stderr
    accepted = ask(CUVEE_SANDBOX="rlimits")
    assert accepted.stdout == "['2']\n" and accepted.stderr == ""
    refused = ask(CUVEE_SANDBOX="namespaces")
    assert refused.returncode == 1 and refused.stdout == ""
    assert "does not run on this machine at CUVEE_SANDBOX=namespaces (" in refused.stderr
    assert "Operation not permitted" in refused.stderr and "set CUVEE_SANDBOX=rlimits" in refused.stderr
    assert "CUVEE_SANDBOX: 'rlimit' is not known; did you mean 'rlimits'" in ask(CUVEE_SANDBOX="rlimit").stderr


def test_best_level_and_failure(monkeypatch):
    assert working(best_level())
    with pytest.raises(CuveeError, match="'namespace' is not known; did you mean 'namespaces'"):
        run([Program("", ["1"])], level="namespace")
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda level, roots: [])  # a warden outside the walls that its level needs
    with pytest.raises(CuveeError, match="ended after 0 of 1 programs: RuntimeError: level 'bubblewrap' can't be built"):
        run([Program("", ["1"])], level="bubblewrap")


@pytest.mark.skipif(os.geteuid() != 0, reason="the other user's turn is taken by root only")
def test_as_an_unprivileged_user(tmp_path):
    """The same tests as an ordinary user, with an interpreter that such a user can reach."""
    pythons = [sys.executable, "/usr/bin/python3"]
    import_pytest = "import pytest, sys; assert sys.version_info >= (3, 11)"
    user = {"user": 12345, "group": 12345, "extra_groups": [], "cwd": "/"}
    site = [p for p in sys.path if p.endswith("site-packages")]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join([str(ROOT), *site]), "PYTHONDONTWRITEBYTECODE": "1"}
    for python in pythons:
        try:
            if subprocess.run([python, "-c", import_pytest], env=environment, capture_output=True, **user).returncode == 0:
                break
        except OSError:
            continue
    else:
        pytest.skip("no Python 3.11 with pytest is readable for an ordinary user here")
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o777)
        done = subprocess.run(
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={home}/t", "-c", "/dev/null", "--rootdir", home, __file__],
            env=environment | {"TMPDIR": home, "HOME": home}, capture_output=True, text=True, **user,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
