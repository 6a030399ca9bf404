"""Cases of block lists, and a check of any form of the arithmetic against the definition in fp64."""

import torch
from sparse_oracle import random_lists

from longspan.kernels.sparse import BlockPlan, Blocks, naive

LIMITS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
SCALE = 0.3

# name: (offsets, query block, key block, list heads, query heads, key heads, head dim, causal, weighted, keys a row)
CASES = {
    "one block": ((0, 5), 16, 16, 1, 1, 1, 16, False, False, 1),
    "ragged": ((0, 70, 71, 200), 32, 16, 1, 2, 1, 16, True, False, 3),
    "packed heads": ((0, 70, 130), 16, 32, 2, 8, 2, 16, True, True, 3),
    "list per key head": ((0, 90), 32, 32, 2, 4, 2, 20, False, True, 2),
    "list per query head": ((0, 100), 16, 16, 4, 4, 2, 20, True, True, 5),
    "keys for one head": ((0, 100), 32, 16, 2, 4, 1, 16, False, False, 3),
    "one list": ((0, 150), 64, 64, 1, 4, 4, 16, False, False, 3),
    "small keys": ((0, 33, 170), 64, 16, 1, 1, 1, 16, True, True, 7),
}


def make(name, chosen=None, device="cpu", dtype=torch.float32, case=None):
    """(plan, q, k, v, d_out, d_lse) of a case with random lists, or those of `chosen(queries, keys, heads)`."""
    offsets, query_block, key_block, lists, heads, key_heads, dim, causal, weighted, most = case or CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    queries, keys = Blocks.of(offsets, query_block), Blocks.of(offsets, key_block)
    if chosen is None:
        columns = random_lists(queries, keys, lists, most, causal, generator)
    else:
        columns = chosen(queries, keys, lists)
    weight = torch.randn(len(keys), generator=generator) if weighted else None
    queries, keys = (blocks.map(lambda x: x.to(device)) for blocks in (queries, keys))
    plan = BlockPlan.of(
        queries, keys, columns.to(device), causal=causal, log_weight=None if weight is None else weight.to(device)
    )
    shapes = ((heads, dim), (key_heads, dim), (key_heads, dim), (heads, dim), (heads,))
    q, k, v, d_out, d_lse = (torch.randn(offsets[-1], *shape, generator=generator).to(device) for shape in shapes)
    return plan, q.to(dtype), k.to(dtype), v.to(dtype), d_out.to(dtype), d_lse


def of_one_list(queries, keys, heads):
    """Every block of keys is named by one list, by all of its rows."""
    return torch.arange(len(keys)).view(-1, heads).T[:, None].expand(-1, len(queries), -1)


def make_hot(lists, key_heads, block, query_block, **options):
    """As `make`, and another plan for the same: every list names three blocks for all rows, and one more for each;
    with more lists than key heads all others. Chunks of 16 entries: few blocks have more than one."""

    def hot(queries, keys, heads):
        apart = heads if heads > key_heads else 1
        own = torch.arange(len(queries)) % (len(keys) // apart - 3) + 3
        rows = torch.stack([*torch.arange(3).expand(len(queries), 3).T, own], 1)
        return torch.stack([rows * apart + n % apart for n in range(heads)])

    case = (0, 40 * query_block - 5), query_block, block, lists, 2 * lists, key_heads
    plan, *rest = make("hot", hot, case=(*case, options.pop("dim", 16), False, True, 0), **options)
    chosen = plan.row_idx.view(lists, len(plan.queries), 4)
    given = {"causal": False, "log_weight": plan.log_weight, "ascending": True, "chunk": 16}
    return (BlockPlan.of(plan.queries, plan.keys, chosen, apart=apart, **given) for apart in (False, True)), *rest


# name: whether dense blocks and chosen ones are there
BESIDE = {"both": (True, True), "none chosen": (True, False), "all chosen": (False, True)}


def make_beside(name, query_block=32, dim=16, causal=True, dtype=torch.float32):
    """As `make`: queries of two documents attend to some of 5 blocks of 16 keys, chosen for each of two heads, and to
    all of 50 and 90 keys behind these, in blocks of 16 by query and of 64 by key, for both heads."""
    dense, few = BESIDE[name]
    generator, offsets, ends = torch.Generator().manual_seed(7), (0, 150, 320), (0, 50, 140)
    queries, chosen, small, large = (
        Blocks.of(*x) for x in ((offsets, query_block), ((0, 80), 16), (ends, 16), (ends, 64))
    )
    document = queries.document[:, None]

    def listed(blocks):
        """[queries, n]: all blocks of a query block's document, -1 for others."""
        here = torch.where(blocks.document == document, torch.arange(len(blocks)), -1)
        return here if dense else here[:, :0]

    both = {x: torch.cat([getattr(chosen, x), getattr(small, x)]) for x in ("length", "position", "step", "document")}
    keys = Blocks(16, torch.cat([chosen.start, small.start + 80]), **both)
    behind = Blocks(64, large.start + 80, large.length, large.position, large.step, large.document)
    some = torch.rand(2, len(queries), 5, generator=generator).argsort(-1)[..., : 3 * few]
    by_query = torch.where(listed(small) < 0, -1, listed(small) + 5).expand(2, -1, -1)
    weights = torch.randn(3, generator=generator)
    weight = torch.cat([weights[:1].expand(5), weights[1:][small.document.long()]])
    options = {"causal": causal, "ascending": True}
    plan = BlockPlan.of(queries, keys, torch.cat([some, by_query], 2).int(), log_weight=weight, **options)
    weight = weights[1:][large.document.long()]
    other = BlockPlan.of(queries, behind, listed(large)[None].int(), log_weight=weight, chunk=2, **options)
    plan = plan.beside(other, chosen, some[0].numel(), 3)
    q, d_out = (torch.randn(320, 2, dim, generator=generator).to(dtype) for _ in range(2))
    k, v = (torch.randn(220, 2, dim, generator=generator).to(dtype) for _ in range(2))
    return plan, q, k, v, d_out, torch.randn(320, 2, generator=generator)


def check(form, plan, q, k, v, d_out, d_lse):
    """Outputs, lse and every gradient of a form against the definition; gives what the form gave."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    wanted, wanted_lse = naive.attend(*leaves, plan, SCALE)
    seen = wanted_lse > -torch.inf
    d_lse = torch.where(seen, d_lse, 0)
    loss = (wanted * d_out.double()).sum() + (torch.where(seen, wanted_lse, 0) * d_lse.double()).sum()
    gradients = torch.autograd.grad(loss, leaves)
    out, lse = form.forward(q, k, v, plan, SCALE)
    actual = form.backward(d_out, d_lse, q, k, v, out, lse, plan, SCALE)
    assert torch.equal(lse > -torch.inf, seen) and not out[~seen].any()
    assert [x.dtype for x in (out, *actual)] == [q.dtype] * 4
    pairs = {"out": (out, wanted), "lse": (torch.where(seen, lse, 0), torch.where(seen, wanted_lse, 0))}
    pairs |= {name: pair for name, *pair in zip(("dq", "dk", "dv"), actual, gradients)}
    errors = {
        name: ((x.double() - y).norm() / y.norm().clamp(min=1e-3 * y.numel() ** 0.5)).item()
        for name, (x, y) in pairs.items()
    }
    assert all(error <= LIMITS[q.dtype] for error in errors.values()), errors  # NaN is no error below a limit
    return out, lse, *actual
