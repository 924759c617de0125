"""Imported first by a fork server: what must happen before Transformer Engine is imported."""

from stages.model import cuda

cuda.prepare()
