"""What the attention functions send: states of constant size, and only keys that some query elsewhere can see."""

import pytest
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


def linear_traffic(rank, world_size, layout_name, strategy, decay):
    """Calls and bytes, forward and backward, of a short and of a long document."""
    traffic = []
    for length in (1024, 4096):
        layout = {"contiguous": contiguous, "zigzag": zigzag}[layout_name]((length,), world_size)
        log_decay = None if decay is None else -torch.rand(layout.tokens_per_rank[rank], KEY_HEADS)
        passes = forward_and_backward(
            linear_attention, layout, rank, (KEY_HEADS,) * 3, strategy=strategy, log_decay=log_decay
        )
        traffic.append([(one.num_calls, one.num_bytes) for one in passes])
    return traffic


@pytest.mark.parametrize("decay", [None, "scalar"])
@pytest.mark.parametrize("strategy", ["lasp2", "lasp"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_linear_attention_sends_the_same_at_any_length(layout, strategy, decay):
    ranks = run_ranks(linear_traffic, WORLD_SIZE, layout, strategy, decay)
    states = 2 * KEY_HEADS * HEAD_SIZE * HEAD_SIZE * 4  # At most two spans of a rank publish one, in fp32.
    for short, long in ranks:
        for (calls, num_bytes), (long_calls, long_bytes) in zip(short, long):
            assert long_calls == calls
            assert abs(long_bytes - num_bytes) <= 64  # Shapes that ranks compare are pickled numbers.
            assert num_bytes <= 1.1 * states + 1024
    assert sum(forward[1] for (forward, _), _ in ranks) > WORLD_SIZE * states / 4


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


def cut_at_documents(rank, world_size, attention_name):
    """Documents that end where ranks end: nobody needs anything from another rank."""
    layout = contiguous((64,) * world_size, world_size)
    attention = {"linear": linear_attention, "softmax": softmax_attention}[attention_name]
    forward, backward = forward_and_backward(attention, layout, rank, (KEY_HEADS,) * 3)
    return forward.num_bytes, backward.num_bytes


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_documents_that_do_not_cross_ranks_send_nothing(attention):
    for forward, backward in run_ranks(cut_at_documents, WORLD_SIZE, attention):
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


def softmax_traffic(rank, world_size, causal, strategy):
    results = {}
    for name, make_layout in LAYOUTS.items():
        passes = forward_and_backward(
            softmax_attention, make_layout(), rank, (4, KEY_HEADS, KEY_HEADS), causal=causal, strategy=strategy
        )
        results[name] = [{n: b for n, b in t.bytes.items() if "gather" not in n} for t in passes]
        results[name] = [sum(counts.values()) for counts in results[name]]
    return results


def test_the_ring_sends_only_keys_that_are_seen():
    token = 2 * KEY_HEADS * HEAD_SIZE * 4  # One key and one value in fp32.
    sent = {causal: run_ranks(softmax_traffic, WORLD_SIZE, causal, "ring") for causal in (True, False)}
    for name, make_layout in LAYOUTS.items():
        for causal in (True, False):
            forward = sum(rank[name][0] for rank in sent[causal])
            backward = sum(rank[name][1] for rank in sent[causal])
            wanted = sum(tokens_wanted(make_layout(), causal))
            assert forward == wanted * token, f"{name}, causal={causal}"
            assert backward <= 2 * wanted * token, f"{name}, causal={causal}"  # Keys again, and their gradients.
