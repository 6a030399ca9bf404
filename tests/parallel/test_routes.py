"""Remaps and routes bring every row where it belongs, and their gradient is their transpose."""

import pytest
import torch
import torch.distributed as dist
from cases import LENGTHS, layouts, random_layout
from spawn import run_ranks
from traffic import Traffic

from longspan.parallel import Remap, Route, contiguous, zigzag
from longspan.parallel.routes import route_table

WORLD_SIZES = [1, 2, 3, 4, 8]


def rows(indices, shape, dtype):
    """Rows [len(indices), *shape] whose values name their token and column; exact in every dtype for tokens < 200."""
    values = torch.as_tensor(indices).view(-1, *[1] * len(shape)).expand(-1, *shape)
    return (values + torch.arange(shape[-1]) if shape else values).to(dtype)


def inner(x, y):
    """<x, y> over all ranks."""
    total = (x.double() * y.double()).sum()
    dist.all_reduce(total)
    return total.item()


def layout_pairs(world_size):
    for name, lengths in LENGTHS.items():
        named = list(layouts(lengths, world_size).items())
        for (src_name, src), (dst_name, dst) in zip(named, [*named[1:], named[0]]):
            yield f"{name}: {src_name} to {dst_name}", src, dst
        yield f"{name}: {src_name} to itself", src, src


def remap_everything(rank, world_size):
    group = dist.group.WORLD
    failures = []
    generator = torch.Generator().manual_seed(rank)
    for case, src, dst in layout_pairs(world_size):
        remap = Remap(src, dst, group)
        for shape, dtype in [((), torch.int64), ((3,), torch.float64), ((2, 5), torch.float32), ((2,), torch.bfloat16)]:
            x = rows(src.global_indices(rank) % 100, shape, dtype)
            moved = remap(x)
            expected = rows(dst.global_indices(rank) % 100, shape, dtype)
            if moved.dtype != dtype or not torch.equal(moved, expected):
                failures.append(f"{case}, {dtype}{shape}: rows in wrong places")
            if not torch.equal(remap.inverse(moved), x):
                failures.append(f"{case}, {dtype}{shape}: the inverse does not bring the rows back")
        x = torch.randn(src.tokens_per_rank[rank], 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
        y = torch.randn(dst.tokens_per_rank[rank], 2, 3, dtype=torch.float64, generator=generator)
        moved = remap(x)
        (transposed,) = torch.autograd.grad(moved, x, y)
        # A permutation's transpose is its inverse, exactly.
        if not torch.equal(transposed, remap.inverse(y)):
            failures.append(f"{case}: the gradient is not the inverse")
        forward, backward = inner(moved.detach(), y), inner(x.detach(), transposed)
        if abs(forward - backward) > 1e-12 * (1 + abs(forward)):
            failures.append(f"{case}: <Rx, y> = {forward} but <x, R^T y> = {backward}")
    return failures


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_remap_moves_every_row_and_its_gradient_moves_back(world_size):
    for rank, failures in enumerate(run_ranks(remap_everything, world_size)):
        assert not failures, f"rank {rank}:\n" + "\n".join(failures)


def wanted_rows(layout, kind):
    """Rows with copies: what a halo, a gather or a block fetch asks for; global indices per rank."""
    num_tokens = layout.num_tokens
    generator = torch.Generator().manual_seed(num_tokens)
    wanted = []
    for rank in range(layout.world_size):
        held = torch.from_numpy(layout.global_indices(rank))
        if kind == "halo":  # The two tokens before each held token, so most rows are wanted twice, some on two ranks.
            wanted.append(torch.cat([held - 2, held - 1]).clamp(min=0))
        elif kind == "gather":
            wanted.append(torch.arange(num_tokens))
        elif kind == "repeats":
            wanted.append(torch.randint(num_tokens, (2 * num_tokens,), generator=generator))
        else:  # Only the last rank asks, for one row, three times.
            wanted.append(torch.full((3 if rank == layout.world_size - 1 else 0,), num_tokens - 1))
    return [indices.numpy() for indices in wanted]


def copy_rows(rank, world_size):
    group = dist.group.WORLD
    failures = []
    for name, lengths in LENGTHS.items():
        for layout_name, layout in layouts(lengths, world_size).items():
            for kind in ["halo", "gather", "repeats", "one"]:
                case = f"{name}, {layout_name}, {kind}"
                wanted = wanted_rows(layout, kind)
                route = Route(route_table(layout, rank, wanted), group)
                x = rows(layout.global_indices(rank), (3,), torch.float64).requires_grad_()
                out = route(x)
                if not torch.equal(out, rows(wanted[rank], (3,), torch.float64)):
                    failures.append(f"{case}: wrong rows")
                # Every rank weighs its copies differently; the oracle sums them over a global tensor.
                generator = torch.Generator().manual_seed(0)
                weights = [torch.randn(len(w), 3, dtype=torch.float64, generator=generator) for w in wanted]
                expected = torch.zeros(layout.num_tokens, 3, dtype=torch.float64)
                for indices, weight in zip(wanted, weights):
                    expected.index_add_(0, torch.from_numpy(indices), weight)
                (grad,) = torch.autograd.grad(out, x, weights[rank])
                expected = expected[torch.from_numpy(layout.global_indices(rank))]
                if not torch.allclose(grad, expected, rtol=0, atol=1e-12):
                    failures.append(f"{case}: copies are not summed in the gradient")
                (again,) = torch.autograd.grad(route(x), x, weights[rank])
                if not torch.equal(grad, again):
                    failures.append(f"{case}: the gradient differs from run to run")
    return failures


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_copied_rows_sum_their_gradients(world_size):
    for rank, failures in enumerate(run_ranks(copy_rows, world_size)):
        assert not failures, f"rank {rank}:\n" + "\n".join(failures)


def low_precision_sum(rank, world_size):
    layout = contiguous((4,), world_size)
    wanted = [[0] * 256] * world_size
    route = Route(route_table(layout, rank, wanted), dist.group.WORLD)
    x = torch.ones(layout.tokens_per_rank[rank], 1, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(route(x), x, torch.ones(256, 1, dtype=torch.bfloat16))
    return grad


def test_bf16_gradients_of_copies_are_summed_in_fp32():
    # 1024 ones added one by one in bf16 would stop at 256.
    grads = run_ranks(low_precision_sum, 4)
    assert grads[0].dtype == torch.bfloat16
    assert grads[0].item() == 1024


def count_bytes(rank, world_size):
    src, dst = zigzag((64,), world_size), random_layout((64,), world_size, seed=1)
    x = torch.zeros(src.tokens_per_rank[rank], 256)
    with Traffic() as traffic:
        Remap(src, dst, dist.group.WORLD)(x)
    return traffic.num_bytes, x.nbytes


def test_a_remap_sends_each_row_at_most_once():
    for sent, held in run_ranks(count_bytes, 4):
        assert 0 < sent <= held


def wrong_number_of_rows(rank, world_size):
    src, dst = contiguous((10,), world_size), zigzag((10,), world_size)
    with pytest.raises(ValueError, match="99"):
        Remap(src, dst, dist.group.WORLD)(torch.zeros(99, 2))
    with pytest.raises(ValueError):
        Remap(src, contiguous((11,), world_size), dist.group.WORLD)
    with pytest.raises(ValueError):
        Remap(src, contiguous((10,), world_size + 1), dist.group.WORLD)
    with pytest.raises(ValueError):
        Remap(contiguous((10,), world_size + 1), contiguous((10,), world_size + 1), dist.group.WORLD)
    with pytest.raises(ValueError, match="0..9"):
        route_table(src, rank, [[10], [0]])


def test_wrong_rows_layouts_and_groups_are_refused():
    run_ranks(wrong_number_of_rows, 2)


def test_without_a_group_a_remap_is_a_local_permutation():
    src, dst = contiguous((7, 3), 1), random_layout((7, 3), 1, seed=3)
    x = torch.arange(10)
    moved = Remap(src, dst, None)(x)
    assert torch.equal(moved, torch.from_numpy(dst.global_indices(0)))
