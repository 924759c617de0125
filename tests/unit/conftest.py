"""What tests of post-training share, made once a process."""

import pytest
from post_helpers import COMMON, artifact, number_prompts, run, save_checkpoint

from stages.stage import Kind


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A random checkpoint."""
    return artifact(save_checkpoint(tmp_path_factory.mktemp("start"), std=0.1), Kind.CHECKPOINT)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    return {"math": number_prompts(tmp_path_factory.mktemp("prompts"), 10)}


@pytest.fixture(scope="session")
def speaker(start, prompts, tmp_path_factory):
    """A policy that answers a digit and ends its turn, by SFT."""
    folder = tmp_path_factory.mktemp("sft") / "out"
    metrics = run(
        "train.sft", {**COMMON, "steps": 40, "batch_groups": 16, "lr": 0.01}, folder, init=start, prompts=prompts
    )
    assert list(metrics)[:2] == ["loss_first", "loss"]
    assert metrics["loss"] < 0.5 * metrics["loss_first"]
    return artifact(folder, Kind.CHECKPOINT)
