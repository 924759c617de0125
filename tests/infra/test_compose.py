"""infra/compose: valid, on loopback only, in step with infra/kubernetes, its secrets in a file that is not here."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

COMPOSE = Path(__file__).parents[2] / "infra/compose"
FILE = COMPOSE / "docker-compose.yaml"
SERVICES = yaml.safe_load(FILE.read_text())["services"]


def compose(*arguments, **kwargs):
    program = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*program, "version"], capture_output=True).returncode:
        program = ["docker-compose"]
        if not shutil.which(program[0]):
            pytest.skip("needs docker compose (Debian's docker-compose 2)")
    return subprocess.run([*program, "-f", str(FILE), *arguments], capture_output=True, text=True, **kwargs)


def test_it_is_valid_once_filled_in(tmp_path):
    filled = re.sub(r"=$", "=f1ll3d", (COMPOSE / "example.env").read_text(), flags=re.M)
    (tmp_path / "env").write_text(filled)
    out = compose("--env-file", str(tmp_path / "env"), "--profile", "metrics", "config")
    assert out.returncode == 0, out.stderr
    found = yaml.safe_load(out.stdout)["services"]
    assert set(found) == set(SERVICES)
    for service in found.values():
        for path in (mount["source"] for mount in service.get("volumes", []) if mount["type"] == "bind"):
            assert Path(path).exists() or path.endswith("/data"), path


def test_it_refuses_to_start_without_passwords():
    out = compose("--env-file", str(COMPOSE / "example.env"), "config", "-q")
    assert out.returncode != 0 and "set it in infra/compose/.env" in out.stderr


def test_nothing_is_reached_from_elsewhere():
    for name, service in SERVICES.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged") and service.get("network_mode") != "host", name


def test_no_secret_is_written_here():
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|AUTH(?!_CONFIG)|SESSION", key):
                assert re.fullmatch(r"\$\{\w+(:\?[^}]*)?\}", value), f"{name}: {key}"
    used = set(re.findall(r"\$\{(\w+)", FILE.read_text()))
    assert used == set(re.findall(r"^(\w+)=", (COMPOSE / "example.env").read_text(), re.M))
    assert "infra/compose/.env" in (COMPOSE.parents[1] / ".gitignore").read_text()
