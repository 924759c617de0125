"""WHEN: recipes, the command line, launching. The only place that imports Prefect."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_store(conf: Any) -> Any:
    """The artifact store that `conf.store` names. Raises CuveeError when it can't be used."""
    from flows.config import state_dir

    if conf.store.kind == "s3":
        from stages.store.s3 import S3Store

        return S3Store(conf.store.uri, cache=state_dir() / "cache", endpoint=conf.store.endpoint)
    from stages.store.local import LocalStore

    return LocalStore(Path(conf.store.uri) if conf.store.uri else state_dir() / "store")
