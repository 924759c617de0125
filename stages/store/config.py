"""Where artifacts are kept: the fields of conf/store."""

from __future__ import annotations

from dataclasses import dataclass

from stages.stage import placement


@dataclass
class Config:
    kind: str = placement("local", "a folder (local) or a bucket (s3)")
    uri: str = placement("", "folder, or s3://bucket/prefix; empty: store/ in the state directory")
    endpoint: str = placement("", "another S3 service than AWS, e.g. http://127.0.0.1:9000")
    cache: str = placement("", "folder of what was read or made here; empty: cache/ in the state directory")
    cache_gb: float = placement(200.0, "above it the longest unused artifacts go, one in use never; 0: no limit")
