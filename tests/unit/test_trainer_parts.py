"""Parts of the trainer: sequences shared among context-parallel ranks, parameter groups, FP32 main weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.model.cpu import cuda_names
from stages.trainer.batch import Sequence
from stages.trainer.microbatch import Sharing, build, context_share, microbatches
from stages.trainer.optimizer import rectangles
from tests.resume.trainer_run import SIZES, Counting, config


def groups(*lengths: int, seed: int = 0) -> list[list[Sequence]]:
    rng = np.random.default_rng(seed)
    return [[Sequence(rng.integers(1, 280, n).astype(np.int32), np.arange(n, dtype=np.float32) % 3)] for n in lengths]


def test_context_share_is_the_first_and_last_pieces_of_each_document():
    """The example in Transformer Engine's documentation: sequences of 8 and 4 tokens, two ranks."""
    assert context_share([8, 4], 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_share([8, 4], 1, 2).tolist() == [2, 3, 4, 5, 9, 10]


@pytest.mark.parametrize("ranks, align", [(2, 1), (4, 1), (2, 16), (8, 3)])
def test_context_ranks_have_every_target_once(ranks, align):
    batch = groups(5, 33, 1, 16, 7)
    numbers = list(range(5))
    whole = build(batch, numbers, 288, 64)
    shares = [
        build(batch, numbers, 288, 64, Sharing(context_rank=r, context_ranks=ranks, align=align)) for r in range(ranks)
    ]
    padded = np.zeros(sum(shares[0].packing.lengths), np.int64)
    seen = np.zeros(len(padded), int)
    for rank, share in enumerate(shares):
        rows = context_share(share.packing.lengths, rank, ranks)
        assert share.tokens.shape == (1, len(padded) // ranks) and len(padded) % (ranks * align) == 0
        padded[rows] = share.tokens[0]
        seen[rows] += 1
        # What is of whole sequences is the same on every rank, and in the order of the single process.
        assert torch.equal(share.mask, whole.mask) and torch.equal(share.sequence, whole.sequence)
        assert np.array_equal(share.places, whole.places)
    assert (seen == 1).all() and all(n % (2 * ranks) == 0 for n in shares[0].packing.lengths)
    assert sorted(i for s in shares for i in s.here.tolist()) == list(range(len(whole.targets)))
    assert sorted(i for s in shares for i in s.last_here.tolist()) == numbers
    starts = np.cumsum([0, *shares[0].packing.lengths])
    for share in shares:
        assert torch.equal(share.targets, whole.targets[share.here])
        # A target's row holds the token before it, and the last row the sequence's last token.
        for row, target in zip(share.rows.tolist(), share.here.tolist(), strict=True):
            sequence = batch[whole.sequence[target]][0].tokens
            place = int(whole.places[target])
            assert share.tokens[0, row] == sequence[place] and whole.targets[target] == sequence[place + 1]
        for row, number in zip(share.last.tolist(), share.last_here.tolist(), strict=True):
            assert share.tokens[0, row] == batch[number][0].tokens[-1]
    for number, group in enumerate(batch):
        tokens = group[0].tokens
        assert np.array_equal(padded[starts[number] : starts[number] + len(tokens)], tokens)


def test_virtual_stages_get_microbatches_of_one_length_in_turns():
    batch = groups(*range(3, 40))
    for ranks in (1, 2):
        found = [microbatches(batch, 96, 288, 64, Sharing(rank=r, ranks=ranks, turns=2)) for r in range(ranks)]
        assert sorted(n for rank in found for b in rank for n in b.numbers) == list(range(len(batch)))
        for rank in found:
            assert len(rank) == len(found[0]) and len(rank) % 2 == 0
            assert len({b.tokens.shape for b in rank}) == 1


def test_gathered_values_give_the_gradient_of_their_own_share(monkeypatch):
    """Two ranks, played in turn: the sum over ranks is what all_reduce gives each."""
    from stages.trainer import trainer

    values = torch.arange(5.0, requires_grad=True)
    here = [torch.tensor([0, 3]), torch.tensor([1, 2, 4])]
    whole = sum(torch.zeros(5).index_copy(0, h, values.detach()[h]) for h in here)
    monkeypatch.setattr(trainer.dist, "all_reduce", lambda tensor, group: tensor.copy_(whole))
    monkeypatch.setattr(trainer.parallel_state, "get_context_parallel_group", lambda: None)
    for h in here:
        found = trainer._AllContext.apply(values[h], h, 5)
        assert torch.equal(found.detach(), whole)
        (found**2).sum().backward()
    assert torch.equal(values.grad, 2 * values.detach())


@pytest.mark.parametrize("shape", [(7,), (1, 9), (6, 5), (5, 1)])
def test_rectangles_have_every_element_of_a_range_in_turn(shape):
    whole = np.arange(np.prod(shape)).reshape(shape)
    for begin in range(whole.size + 1):
        for end in range(begin, whole.size + 1):
            found = list(rectangles(shape, begin, end))
            slices = [tuple(slice(a, a + n) for a, n in zip(at, size, strict=True)) for at, size in found]
            assert [int(i) for one in slices for i in whole[one].ravel()] == list(range(begin, end))
            assert len(found) <= (1 if len(shape) == 1 else 3) and all(min(size) > 0 for _, size in found)


def test_parameter_groups():
    """Weight decay on matrices only; muP's multiplier on the learning rate of hidden matrices only."""
    from stages.trainer.trainer import Trainer

    trainer = Trainer(config(weight_decay=0.1), replace(SIZES, mup_base_width=8), lambda batch: None)
    names = {id(p): name for name, p in trainer.chunks[0].named_parameters()}
    found = {}
    for group in trainer.optimizer.inner.param_groups:
        for p in group["params"]:
            found[names[id(p)]] = (group["weight_decay"], group["lr_mult"])
    assert len(found) == len(names)
    for name, values in found.items():
        decay = 0.0 if "norm" in name else 0.1
        assert values == (decay, 8 / SIZES.hidden_size if "linear" in name else 1.0), name
    with cuda_names():
        trainer.optimizer.step(1e-2, 1.0)
    assert {g["lr"] for g in trainer.optimizer.inner.param_groups} == {1e-2, 1e-2 * 8 / SIZES.hidden_size}


class Half:
    """A model with BF16 parameters and its optimizer. On a CPU there are no BF16 layers: gradients are given."""

    def __init__(self, seed: int, distributed: bool):
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        from stages.model import weights
        from stages.model.model import Model
        from stages.trainer import parallel
        from stages.trainer.optimizer import Optimizer

        c = config(precision="bf16", distributed_optimizer=distributed, weight_decay=0.0, clip_grad=0.0)
        self.rows, self.weights, exact = weights.table(SIZES), weights, {}
        self.source = weights.Initial(self.rows, seed)
        parallel.initialise(config())
        self.model = Model(SIZES, "lm").bfloat16()
        weights.load([self.model], self.rows, self.source, exact)
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
        self.wrapped = DistributedDataParallel(self.model.config, settings, self.model)
        self.optimizer = Optimizer(c, SIZES, [self.wrapped], exact)

    def main(self) -> dict[str, torch.Tensor]:
        return self.weights.state([self.model], self.rows, self.optimizer.main)

    def step(self) -> float:
        self.wrapped.zero_grad_buffer()
        for parameter in self.model.parameters():
            parameter.main_grad.fill_(1.0)
        norm = self.optimizer.norm()
        self.optimizer.step(1e-6, norm)
        return norm


@pytest.mark.parametrize("distributed", [False, True])
def test_main_weights_are_exact_beside_bf16_parameters(distributed, tmp_path):
    """They start as the FP32 source, not as what BF16 makes of it, take updates that BF16 would lose, are what leaves the
    trainer, and go on from a checkpoint as they were."""
    from stages.trainer import checkpoint

    with cuda_names():
        half = Half(3, distributed)
        start = half.main()
        assert all(torch.equal(start[name], half.source[name]) for name in start)
        rounded = half.weights.state([half.model], half.rows)
        assert any(not torch.equal(rounded[name], start[name]) for name in start)
        assert half.step() == pytest.approx(SIZES.parameters() ** 0.5, rel=1e-4)
        after = half.main()
        for name in start:
            assert torch.allclose(start[name] - after[name], torch.tensor(1e-6), rtol=0.15, atol=0)  # FP32 rounding
        assert all(torch.equal(p, half.optimizer.main(p).bfloat16()) for p in half.model.parameters())
        state = half.optimizer.sharded_state({"model": half.model}, False)
        checkpoint.Checkpoints(tmp_path, background=False).save(1, state, {})
        other = Half(4, distributed)
        state = checkpoint.load(tmp_path / "0000000001", other.optimizer.sharded_state({"model": other.model}, True))
        other.optimizer.load({"model": other.model}, state)
        found = other.main()
        assert all(torch.equal(found[name], after[name]) for name in after)
        half.step(), other.step()  # moments and step counts are the same too
        expected, found = half.main(), other.main()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert any(not torch.equal(found[name], after[name]) for name in after)


def test_fewer_groups_than_ranks_still_have_logprobs():
    """Probes of a rollout engine are few: the trainer repeats one where every rank must have some."""
    from stages.trainer.trainer import Trainer

    trainer = Trainer(config(), SIZES, lambda batch: None)
    batch = Counting().batch(0, None)
    expected = trainer.logprobs(batch)
    trainer._shortage = lambda groups: 3
    found = trainer.logprobs(batch)
    assert len(found) == len(expected)
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_a_value_network_s_shared_optimizer_is_saved_beside_the_policy_s(tmp_path):
    from stages.trainer.checkpoint import Checkpoints
    from stages.trainer.trainer import Trainer

    def made(seed):
        trainers = [Trainer(config(distributed_optimizer=True, seed=seed + i), SIZES, lambda batch: None, head=head)
                    for i, head in enumerate(("lm", "value"))]  # fmt: skip
        trainers[0].critic = trainers[1]
        return trainers

    policy, critic = made(1)
    policy.save_state(Checkpoints(tmp_path, background=False), 1, {})
    others = made(5)
    others[0].load_state(tmp_path / "0000000001")
    for trainer, other in zip((policy, critic), others, strict=True):
        for (_, own), (_, found) in zip(trainer.optimizer._shared().items(), other.optimizer._shared().items(), strict=True):
            assert torch.equal(trainer.optimizer._held(own)["param"], other.optimizer._held(found)["param"])


def test_a_trace_begins_with_the_first_of_its_steps_that_is_taken(tmp_path):
    """A resumed run may begin within them."""
    from stages.trainer import parallel
    from stages.trainer.meter import Trace

    parallel.join()
    trace = Trace(config(profile_steps=[2, 5], profile_dir=str(tmp_path)))
    for step in range(3, 7):  # from 0
        trace.before(step)
        trace.after(step)
    assert [file.name for file in tmp_path.iterdir()] == ["steps-2-5.json"] and trace._profiler is None
