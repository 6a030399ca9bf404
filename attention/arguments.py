"""What the public attention functions share: finding the sequence context and refusing bad input on all ranks alike."""

from contextlib import nullcontext
from difflib import get_close_matches

import torch

from longspan.attention.recompute import recomputing
from longspan.parallel.context import SequenceContext, SequenceParallel
from longspan.parallel.exchange import agree, group_rank, group_size
from longspan.parallel.layout import Layout, contiguous
from longspan.parallel.scan import TRANSPORTS


def resolve(seq, layout, group, tensors, check, options, **strategies) -> SequenceContext:
    """The context to run in: `seq` as it is, or one made from layout and group.

    tensors: name -> packed tensor [T_local, H, D], or None; `check()` raises ValueError for what else is wrong with
    them. With a group, an error on one rank and a difference in shapes, dtypes or `options` between ranks raise
    ValueError on every rank. Without a layout the tokens are one document on one rank.
    """
    if seq is not None:
        if layout is not None or group is not None or any(value != "auto" for value in strategies.values()):
            raise ValueError("seq already names layout, group and strategy; give either seq or those")
        _check_tensors(tensors, seq.num_tokens_local)
        check()
        return seq
    error = None
    try:
        if layout is None:
            if group is not None:
                raise ValueError("group is given without layout; pass the Layout that says who holds which tokens")
            layout = _one_document(tensors)
        if not isinstance(layout, Layout):
            raise ValueError(f"layout must be a longspan.parallel.Layout, got {type(layout).__name__}")
        if layout.world_size != group_size(group):
            raise ValueError(f"the layout has {layout.world_size} ranks but the group has {group_size(group)}")
        _check_tensors(tensors, layout.tokens_per_rank[group_rank(group)])
        check()
    except ValueError as problem:
        error = str(problem)
    shapes = {name: x if x is None else (tuple(x.shape[1:]), str(x.dtype)) for name, x in tensors.items()}
    if not recomputing():  # the forward pass has agreed already
        agree(error, (shapes, options, tuple(strategies.items()), error is None and hash(layout)), group)
    first = next(iter(tensors.values()))
    return SequenceParallel(group, device=first.device, **strategies).context(layout)


def without_autocast(device_type: str):
    """A context in which autocast, where it is on, does not round scores, states and sums."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


def pick(table, name: str, default: str, what: str) -> str:
    """`name`, or `default` for "auto"; ValueError names the nearest entry of `table`."""
    if name == "auto":
        return default
    if name not in table:
        near = get_close_matches(str(name), table, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} {name!r} is unknown; use auto, {', '.join(table)}{hint}")
    return name


def pick_transport(seq, causal: bool) -> str:
    """How states travel, a name in TRANSPORTS or "auto"."""
    transport = pick(TRANSPORTS, seq.parallel.linear, "auto", "linear strategy")
    if transport != "auto" and TRANSPORTS[transport].causal_only and not causal:
        raise ValueError(f"strategy {transport!r} passes states in causal order; with causal=False use 'lasp2'")
    return transport


def _one_document(tensors) -> Layout:
    name, first = next(iter(tensors.items()))
    if first.shape[0] < 1:
        raise ValueError(f"{name} has no tokens; a document has at least one")
    return contiguous((first.shape[0],), 1)


def _check_tensors(tensors, num_tokens: int):
    (first_name, first), *_ = tensors.items()
    for name, x in tensors.items():
        if x is None:
            continue
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}; use a floating-point dtype")
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device} but {first_name} is on {first.device}")
        if x.ndim != 3:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; packed tensors are [tokens, heads, head_dim]")
        if x.dtype != first.dtype:
            raise ValueError(f"{name} has dtype {x.dtype} but {first_name} has {first.dtype}; give them one dtype")
        if x.shape[0] != num_tokens:
            raise ValueError(f"{name} has {x.shape[0]} tokens but the layout gives this rank {num_tokens}")
