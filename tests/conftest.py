"""Tiny models are fastest on one thread, and do not slow each other down."""

import gc

import pytest


def pytest_collection_finish():
    gc.freeze()  # what the tests import stays: no collection walks it again, here or in a fork


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
