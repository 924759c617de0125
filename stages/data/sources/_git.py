"""The files of a bare Git repository at its HEAD, read by `git` itself; a checkout is a folder like any other."""

from __future__ import annotations

import io
import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

from stages.data.sources._files import Entry, documents  # noqa: F401  (the same files, elsewhere)
from stages.stage import CuveeError


@dataclass
class Blob(Entry):
    """A file of a repository; path: the repository, tag: the object's name, which is the hash of its content."""

    tag: str = ""

    def open(self) -> BinaryIO:
        """The whole file. Raises CuveeError when the repository is damaged."""
        reader = _reader(self.path, os.getpid())
        reader.stdin.write(f"{self.tag}\n".encode())
        reader.stdin.flush()
        answer = reader.stdout.readline().split()
        if len(answer) != 3:
            raise CuveeError(f"data.sources: {self.path} is damaged, object {self.tag} of {self.name} is missing; "
                             "clone it again")
        data = reader.stdout.read(int(answer[2]))
        reader.stdout.read(1)
        return io.BytesIO(data)

    def digest(self) -> str:
        return self.tag


@cache
def _reader(repository: str, process: int) -> subprocess.Popen:
    """`git cat-file --batch`, one a process: it answers in turn."""
    return subprocess.Popen(["git", "-C", repository, "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            env=_environment())  # fmt: skip


def _environment() -> dict[str, str]:
    """What a foreign repository may ask of git: nothing off the network, no replaced objects, no other repository's names."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return kept | {"GIT_NO_LAZY_FETCH": "1", "GIT_CONFIG_NOSYSTEM": "1", "GIT_NO_REPLACE_OBJECTS": "1",
                   "GIT_TERMINAL_PROMPT": "0"}  # fmt: skip


def is_repository(path: Path) -> bool:
    """Whether a folder is a bare repository."""
    return (path / "HEAD").is_file() and (path / "objects").is_dir() and (path / "refs").is_dir()


def entries(source: str) -> list[Entry]:
    """All files at HEAD, sorted by name, without links and submodules. Raises CuveeError where git is missing or fails."""
    path = str(Path(source).expanduser())
    try:
        command = ["git", "-C", path, "ls-tree", "-r", "-l", "-z", "--full-tree", "HEAD"]
        done = subprocess.run(command, capture_output=True, check=False, env=_environment())
    except FileNotFoundError:
        raise CuveeError(f"data.sources: {source} is a Git repository and git is not installed; install it, or give "
                         "a checkout") from None
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()
        raise CuveeError(f"data.sources: {source} cannot be read ({reason}); does it have a commit?")
    found = []
    for line in done.stdout.decode("utf-8", "surrogateescape").split("\0"):
        head, _, name = line.partition("\t")
        if name and head.split()[0] in ("100644", "100755"):
            _, _, tag, size = head.split()
            found.append(Blob(name, int(size), path, take=int(size), tag=tag))
    return sorted(found, key=lambda entry: entry.name)
