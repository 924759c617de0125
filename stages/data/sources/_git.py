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

    PARTS = False
    tag: str = ""

    def open(self) -> BinaryIO:
        """The whole file. Raises CuveeError when the repository is damaged."""
        reader = _reader(self.path, os.getpid())
        reader.stdin.write(f"{self.tag}\n".encode())
        reader.stdin.flush()
        answer = reader.stdout.readline().split()
        if len(answer) != 3:
            raise _damaged(self.path, self.tag, self.name)
        data = reader.stdout.read(int(answer[2]))
        reader.stdout.read(1)
        return io.BytesIO(data)

    def digest(self) -> str:
        return self.tag


@cache
def _reader(repository: str, process: int) -> subprocess.Popen:
    """`git cat-file --batch`, one a process: it answers in turn."""
    return subprocess.Popen([*_git(repository), "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            env=_environment())  # fmt: skip


def _git(repository: str) -> list[str]:
    """git, with what a repository's own configuration may start or ask for switched off."""
    quiet = ["core.fsmonitor=false", "core.hooksPath=/dev/null", "core.alternateRefsCommand=", "protocol.allow=never",
             f"safe.directory={os.path.abspath(repository)}"]  # fmt: skip
    return ["git", *(part for setting in quiet for part in ("-c", setting)), f"--git-dir={repository}"]


def _environment() -> dict[str, str]:
    """What a foreign repository may ask of git: nothing off the network, no replaced objects, no other repository's names,
    and no configuration of this machine or user, on which the bytes must not depend."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return kept | {"GIT_NO_LAZY_FETCH": "1", "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_ALLOW_PROTOCOL": "none",
                   "GIT_NO_REPLACE_OBJECTS": "1", "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_PAGER": "cat"}  # fmt: skip


def _damaged(repository: str, tag: str, name: str) -> CuveeError:
    return CuveeError(f"data.sources: {repository} is damaged, object {tag} of {name} is missing; clone it again")


def is_repository(path: Path) -> bool:
    """Whether a folder is a bare repository."""
    return (path / "HEAD").is_file() and (path / "objects").is_dir() and (path / "refs").is_dir()


def entries(source: str) -> list[Entry]:
    """All files at HEAD, sorted by name, without links and submodules. Raises CuveeError where git is missing or fails."""
    path = str(Path(source).expanduser())
    if (borrowed := Path(path, "objects/info/alternates")).exists():
        raise CuveeError(f"data.sources: {source} borrows objects of other folders ({borrowed}), which may be anyone's; "
                         "copy them in with `git repack -a -d` and remove that file")
    try:
        command = [*_git(path), "ls-tree", "-r", "-l", "-z", "--full-tree", "HEAD"]
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
            if size == "BAD":
                raise _damaged(path, tag, name)
            found.append(Blob(name, int(size), path, take=int(size), tag=tag))
    return sorted(found, key=lambda entry: entry.name)
