"""WHEN: recipes, the command line, launching. The only place that imports Prefect."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def together(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """function(item) of each, in order: a bucket takes as long for many questions at once as for one."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(function, items))


def open_store(conf: Any) -> Any:
    """The artifact store that `conf.store` names. Raises CuveeError when it can't be used."""
    from stages.stage import ConfigError, parse, unknown
    from stages.store.config import Config

    chosen = parse(Config, dict(conf.store), "store")
    if chosen.kind not in ("local", "s3"):
        raise ConfigError(f"store.kind: {unknown(chosen.kind, ['local', 's3'])}")
    if chosen.cache_gb < 0:
        raise ConfigError(f"store.cache_gb: {chosen.cache_gb:g} is negative; give the size of the cache in GB, or 0 for no limit")
    if chosen.kind == "s3":
        from stages.store.s3 import S3Store

        cache = Path(chosen.cache).expanduser() if chosen.cache else shared_dir(conf) / "cache"
        return S3Store(chosen.uri, cache, chosen.endpoint, chosen.cache_gb)
    from stages.store.local import LocalStore

    place = Path(chosen.uri) if chosen.uri else shared_dir(conf) / "store"
    if conf.cluster.get("volume") and not place.exists() and not shared_dir(conf).is_dir():
        raise ConfigError(f"store.uri={place} is on the volume of cluster={conf.cluster.name}, which is not mounted here at "
                          f"{shared_dir(conf)}; use cuvee submit, or a bucket: store=s3 store.uri=s3://bucket/prefix")
    return LocalStore(place)


def shared_dir(conf: Any) -> Path:
    """Where work in progress and copies of artifacts lie: the state directory, or the volume that a cluster's pods share."""
    from flows.config import state_dir

    return Path(conf.cluster.volume.path) if conf.cluster.get("volume") else state_dir()


def open_launcher(conf: Any) -> Any:
    """The launcher that `conf.cluster` names, a file of flows/launchers. Raises ConfigError when there is none."""
    import importlib

    from stages.stage import ConfigError, unknown

    found = sorted(path.stem for path in (Path(__file__).parent / "launchers").glob("[!_]*.py"))
    if conf.cluster.launcher not in found:
        raise ConfigError(f"cluster.launcher: {unknown(conf.cluster.launcher, found)}")
    return importlib.import_module(f"flows.launchers.{conf.cluster.launcher}").Launcher(conf.cluster)
