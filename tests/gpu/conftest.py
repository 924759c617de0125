"""What a CPU cannot show. Skipped without a GPU; `python -m tests.gpu.record` runs them all and keeps what they said."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session", autouse=True)
def prepared():
    import torch

    if torch.cuda.is_available():
        from stages.model import cuda

        cuda.prepare()
