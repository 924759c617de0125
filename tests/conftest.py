"""Tiny models are fastest on one thread, and do not slow each other down."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
