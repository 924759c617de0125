"""The token files: equal to Megatron-core's bytes, readable by both sides."""

from __future__ import annotations

import numpy as np
import pytest

from stages.data.indexed import IndexedTokens, write


@pytest.mark.parametrize("vocab_size", [4096, 256000])
def test_bytes_equal_megatrons(tmp_path, vocab_size):
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, size=n) for n in (5, 1, 300, 17)]
    assert write(tmp_path / "ours", documents, vocab_size) == (4, 323)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    ours, theirs = IndexedTokens(tmp_path / "ours"), IndexedDataset(str(tmp_path / "ours"))
    assert len(ours) == len(theirs) == 4
    for i, document in enumerate(documents):
        assert np.array_equal(ours.document(i), document) and np.array_equal(theirs[i], document)


def test_empty(tmp_path):
    assert write(tmp_path / "none", [], 100) == (0, 0)
    assert len(IndexedTokens(tmp_path / "none")) == 0


def test_damage_is_found(tmp_path):
    write(tmp_path / "a", [[1, 2, 3]], 100)
    (tmp_path / "a.bin").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match="holds 2 bytes"):
        IndexedTokens(tmp_path / "a")
    (tmp_path / "a.idx").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no Megatron index"):
        IndexedTokens(tmp_path / "a")
