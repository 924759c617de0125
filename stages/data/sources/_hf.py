"""Files of a dataset on a Hugging Face hub: hf://datasets/<owner>/<name>[@<revision>][/<folder or file>], as a stream.

HF_ENDPOINT and HF_TOKEN are the hub's and one's own; the revision is the commit it named when the files were listed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO

from stages.data.sources._files import Entry, documents  # noqa: F401  (the same files, elsewhere)
from stages.stage import ConfigError, CuveeError

ADDRESS = re.compile(r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*))?")
BLOCK = 4 << 20  # bytes of a request


@dataclass
class Remote(Entry):
    """A file of a dataset; path: `datasets/<owner>/<name>@<commit>/<file>`, tag: the content's hash on the hub."""

    tag: str = ""

    def open(self) -> BinaryIO:
        """A stream of the file, in requests of BLOCK bytes. Raises CuveeError when it cannot be read."""
        return io.BufferedReader(_Stream(self), 1 << 20)

    def digest(self) -> str:
        return f"{self.tag}:{self.take}"


class _Stream(io.RawIOBase):
    """The hub's file, with its client's errors as ours."""

    def __init__(self, entry: Remote):
        self.name = f"hf://{entry.path}"
        self.file = self._try(_files(_endpoint()).open, entry.path, "rb", block_size=BLOCK, size=entry.size)

    def _try(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except Exception as error:
            raise refused(error, self.name) from None

    def readinto(self, buffer: Any) -> int:
        data = self._try(self.file.read, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readable(self) -> bool:
        return True

    seekable = readable


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


@cache
def _files(endpoint: str) -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem(endpoint=endpoint)


def refused(error: Exception, what: str) -> CuveeError:
    """The sentence for what the hub would not give, whatever its client raises. Raises other defects again."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, (HfHubHTTPError, OSError)) and "http" not in type(error).__module__:
        raise error
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return CuveeError(f"data.sources: {what} cannot be read ({type(error).__name__}: {reason}); check the name, HF_ENDPOINT, "
                      "HF_TOKEN and the network")


def entries(source: str) -> list[Entry]:
    """All files, sorted by name, without hidden ones. Raises ConfigError for a wrong address, CuveeError without access."""
    found = ADDRESS.fullmatch(source.rstrip("/"))
    if not found:
        raise ConfigError(f"data.sources: {source!r} is no dataset of a hub; write hf://datasets/<owner>/<name>[@<revision>][/<folder>]")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    name, path, api = found["name"], found["path"] or "", HfApi(endpoint=_endpoint())
    try:
        commit = api.dataset_info(name, revision=found["revision"]).sha
        try:
            tree = api.list_repo_tree(name, path or None, recursive=True, revision=commit, repo_type="dataset")
            files = [one for one in tree if hasattr(one, "blob_id")]
        except EntryNotFoundError:  # a file is no tree
            files = api.get_paths_info(name, [path], revision=commit, repo_type="dataset")
    except Exception as error:
        raise refused(error, source) from None
    visible = [one for one in files if not any(part.startswith(".") for part in one.path.split("/"))]

    def entry(one: Any) -> Entry:
        short = one.path[len(path) :].lstrip("/") or one.path.rsplit("/", 1)[-1]
        tag = one.lfs.sha256 if one.lfs else one.blob_id
        return Remote(short, one.size, f"datasets/{name}@{commit}/{one.path}", take=one.size, tag=tag)

    return sorted(map(entry, visible), key=lambda one: one.name)
