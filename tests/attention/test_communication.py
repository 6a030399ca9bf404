"""What the attention functions send: states of constant size, and only keys that some query elsewhere can see."""

import itertools

import torch
import torch.distributed as dist
from cases import random_layout
from spawn import run_ranks
from traffic import Traffic

from longspan.attention import linear_attention, softmax_attention
from longspan.parallel import contiguous, zigzag

WORLD_SIZE = 4
KEY_HEADS, HEAD_SIZE = 2, 8


def forward_and_backward(attention, layout, rank, heads, **kwargs):
    """(traffic of the forward pass, traffic of the backward pass) of this rank."""
    q, k, v = (torch.randn(layout.tokens_per_rank[rank], h, HEAD_SIZE, requires_grad=True) for h in heads)
    with Traffic() as forward:
        out = attention(q, k, v, layout=layout, group=dist.group.WORLD, **kwargs)
    with Traffic() as backward:
        out.sum().backward()
    return forward, backward


# Linear attention


LINEAR_CASES = list(itertools.product((contiguous, zigzag), ("lasp2", "lasp"), (False, True)))


def linear_traffic(rank, world_size):
    """Calls and bytes, forward and backward, of a short and of a long document, for every layout, strategy and gate."""
    traffic = []
    for make_layout, strategy, gated in LINEAR_CASES:
        passes = []
        for length in (1024, 4096):
            layout = make_layout((length,), world_size)
            log_decay = -torch.rand(layout.tokens_per_rank[rank], KEY_HEADS) if gated else None
            passes += forward_and_backward(
                linear_attention, layout, rank, (KEY_HEADS,) * 3, strategy=strategy, log_decay=log_decay
            )
        traffic.append([(one.num_calls, one.num_bytes) for one in passes])
    return traffic


def test_linear_attention_sends_the_same_at_any_length():
    states = 2 * KEY_HEADS * HEAD_SIZE * HEAD_SIZE * 4  # At most two spans of a rank publish one, in fp32.
    for case, *ranks in zip(LINEAR_CASES, *run_ranks(linear_traffic, WORLD_SIZE), strict=True):
        for *short, long_forward, long_backward in ranks:
            for (calls, num_bytes), (long_calls, long_bytes) in zip(short, (long_forward, long_backward)):
                assert long_calls == calls, case
                assert abs(long_bytes - num_bytes) <= 64, case  # Shapes that ranks compare are pickled numbers.
                assert num_bytes <= 1.1 * states + 1024, case
        assert sum(forward[1] for forward, *_ in ranks) > WORLD_SIZE * states / 4, case


def test_lasp2_is_one_gather_each_way():
    for forward, backward in run_ranks(gathers, WORLD_SIZE):
        assert forward == backward == 1


def gathers(rank, world_size):
    layout = zigzag((512,), world_size)
    log_decay = -torch.rand(layout.tokens_per_rank[rank], KEY_HEADS).requires_grad_()
    passes = forward_and_backward(
        linear_attention, layout, rank, (KEY_HEADS,) * 3, strategy="lasp2", log_decay=log_decay
    )
    state = KEY_HEADS * HEAD_SIZE * HEAD_SIZE * 4
    return [
        sum(traffic.calls[name] for name in ("all_gather_into_tensor", "all_gather_single"))
        if traffic.num_bytes >= state
        else 0
        for traffic in passes
    ]


def cut_at_documents(rank, world_size):
    """Documents that end where ranks end: nobody needs anything from another rank."""
    layout = contiguous((64,) * world_size, world_size)
    both = (linear_attention, softmax_attention)
    passes = (forward_and_backward(attention, layout, rank, (KEY_HEADS,) * 3) for attention in both)
    return [(forward.num_bytes, backward.num_bytes) for forward, backward in passes]


def test_documents_that_do_not_cross_ranks_send_nothing():
    for linear, softmax in run_ranks(cut_at_documents, WORLD_SIZE):
        for forward, backward in (linear, softmax):
            assert forward <= 512  # What ranks compare with each other, no keys and no states.
            assert backward == 0


# Softmax attention


def tokens_wanted(layout, causal):
    """Per rank, how many of its keys some other rank's queries can see, summed over those ranks."""
    document = torch.repeat_interleave(torch.arange(len(layout.lengths)), torch.tensor(layout.lengths))
    visible = document[:, None] == document[None, :]
    if causal:
        visible = visible.tril()
    held = [torch.from_numpy(layout.global_indices(rank)) for rank in range(layout.world_size)]
    wanted = []
    for mine in held:
        others = [queries for queries in held if queries is not mine]
        wanted.append(sum(int(visible[queries][:, mine].any(0).sum()) for queries in others))
    return wanted


LAYOUTS = {
    "contiguous": lambda: contiguous((256,), WORLD_SIZE),
    "contiguous documents": lambda: contiguous((70, 30, 90, 1, 65), WORLD_SIZE),
    "zigzag": lambda: zigzag((256,), WORLD_SIZE),
    "zigzag documents": lambda: zigzag((70, 30, 90, 1, 65), WORLD_SIZE),
    "random": lambda: random_layout((256,), WORLD_SIZE, seed=5),
}


def softmax_traffic(rank, world_size):
    """Bytes, forward and backward, by layout and whether it is causal; without what ranks compare."""
    results = {}
    for name, causal in itertools.product(LAYOUTS, (True, False)):
        passes = forward_and_backward(
            softmax_attention, LAYOUTS[name](), rank, (4, KEY_HEADS, KEY_HEADS), causal=causal, strategy="ring"
        )
        results[name, causal] = [sum(b for n, b in t.bytes.items() if "gather" not in n) for t in passes]
    return results


def test_the_ring_sends_only_keys_that_are_seen():
    token = 2 * KEY_HEADS * HEAD_SIZE * 4  # One key and one value in fp32.
    ranks = run_ranks(softmax_traffic, WORLD_SIZE)
    for name, causal in ranks[0]:
        forward, backward = (sum(rank[name, causal][n] for rank in ranks) for n in range(2))
        wanted = sum(tokens_wanted(LAYOUTS[name](), causal))
        assert forward == wanted * token, f"{name}, causal={causal}"
        assert backward <= 2 * wanted * token, f"{name}, causal={causal}"  # Keys again, and their gradients.
