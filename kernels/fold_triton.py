"""fold_chains as one Triton launch: a program follows one chain with a tile of one head's state on chip."""

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.fold import MAX_KEYS
from longspan.kernels.launch import launched

BLOCK = 512  # elements of a state per program, where transitions act on them one by one
AHEAD = 16  # states of a chain on their way at once
BLOCK_V = 16  # columns of a state per program, where transitions are matrices


def fold_chains_triton(states, transition, chains, initial=None, parts=None, *, compose=False):
    """See kernels.fold.fold_chains and, for the second result (None unless `compose`), kernels.fold.summarize. fp32,
    states without matrices also bf16; each row of `states` and of `initial` is contiguous, rows need not be."""
    example = initial if states is None else states
    heads, keys, values = example.shape[-3:]
    num_chains, length = chains.sources.shape
    assert all(x is None or x.dtype == torch.float32 for x in (transition, initial)), example.dtype
    assert states is None or states.dtype in (torch.float32, torch.bfloat16), states.dtype
    assert all(x is None or x[:1].is_contiguous() for x in (states, initial)), example.stride()
    assert all(x.is_contiguous() and x.dtype == torch.int32 for x in (chains.sources, chains.targets, chains.initial))
    out, composed = example.new_empty(chains.num_out, heads, keys, values, dtype=torch.float32), None
    if compose:
        composed = transition.new_empty(num_chains, *transition.shape[1:])
    if 0 in (num_chains, length, out.numel()):
        return out, composed
    tables = chains.sources, chains.targets, chains.initial, length
    strides = tuple(0 if x is None else x.stride(0) for x in (states, initial))
    if transition is None or transition.ndim < 4:
        decay_strides = () if transition is None else transition.stride()
        decay_strides += (0,) * (3 - len(decay_strides))
        block = BLOCK if parts is None else BLOCK // 2
        grid = num_chains * cdiv(keys * values, block), heads
        fold_kernel[grid](
            states, transition, initial, out, composed, parts, *tables, *strides, *decay_strides,
            H=heads, K=keys, V=values, BLOCK=block, DECAYS=1 if transition is None or transition.ndim < 3 else keys,
            AHEAD=min(AHEAD, next_power_of_2(length)), PARTS=1 if parts is None else states.shape[1],
        )  # fmt: skip
    else:
        assert keys <= MAX_KEYS and parts is None, (keys, parts)
        block_k = max(16, next_power_of_2(keys))
        tiles = cdiv(values, BLOCK_V) + (cdiv(keys, BLOCK_V) if compose else 0)
        grid = num_chains * tiles, heads
        fold_matrix_kernel[grid](
            states, transition, initial, out, composed, *tables, *strides, *transition.stride(),
            H=heads, K=keys, V=values, BLOCK_K=block_k, BLOCK_V=BLOCK_V, num_warps=4 if block_k <= 64 else 8,
        )  # fmt: skip
    return out, composed


@launched
@triton.jit(do_not_specialize=["length"])
def fold_kernel(
    states_ptr, decay_ptr, initial_ptr, out_ptr, composed_ptr, parts_ptr, sources_ptr, targets_ptr, first_ptr, length,
    states_stride_row, initial_stride_row, decay_stride_row, decay_stride_head, decay_stride_k,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, DECAYS: tl.constexpr,
    AHEAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """No decay, or a log decay of the head (DECAYS = 1, decay_stride_k = 0) or of its key rows (K). If PARTS > 1, a
    state is the sum of its first `parts` [R, H]."""
    tiles: tl.constexpr = (K * V + BLOCK - 1) // BLOCK
    chain, head = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = element < K * V
    if decay_ptr is not None:
        decay_at = decay_ptr + head * decay_stride_head
        if DECAYS > 1:
            decay_at += element // V * decay_stride_k
    if composed_ptr is not None:
        passed = tl.zeros([BLOCK], dtype=tl.float32)
        composed_at = composed_ptr + (chain * H + head) * DECAYS + element // V
        writes = (element % V == 0) & (element // V < DECAYS) & inside
    element += head * K * V
    states_at, out_at = states_ptr + element, out_ptr + element
    sources_ptr += chain * length
    targets_ptr += chain * length

    reached = tl.zeros([BLOCK], dtype=tl.float32)
    if initial_ptr is not None:
        first = tl.load(first_ptr + chain).to(tl.int64)
        initial_at = initial_ptr + first * initial_stride_row + element
        reached = tl.load(initial_at, mask=inside & (first >= 0), other=0.0)
    for start in range(0, length, AHEAD):
        # A chain waits for memory, not for arithmetic: one state at a time took 0.4 to 0.65 us a state on H200.
        sources, targets, states, decays, parts, others = (), (), (), (), (), ()
        for column in tl.static_range(AHEAD):
            at, inside_chain = start + column, start + column < length
            sources += (tl.load(sources_ptr + at, mask=inside_chain, other=-1).to(tl.int64),)
            targets += (tl.load(targets_ptr + at, mask=inside_chain, other=-1).to(tl.int64),)
        for column in tl.static_range(AHEAD):
            passes = inside & (sources[column] >= 0)
            if PARTS > 1:
                parts += (tl.load(parts_ptr + sources[column] * H + head, mask=sources[column] >= 0, other=0),)
            states += (tl.load(states_at + sources[column] * states_stride_row, mask=passes, other=0.0),)
            if decay_ptr is not None:
                reads = passes if DECAYS > 1 else sources[column] >= 0
                decays += (tl.load(decay_at + sources[column] * decay_stride_row, mask=reads, other=0.0),)
        for column in tl.static_range(AHEAD):
            for part in tl.static_range(1, PARTS):
                other_at = states_at + sources[column] * states_stride_row + part * H * K * V
                others += (tl.load(other_at, mask=inside & (part < parts[column]), other=0.0),)
        for column in tl.static_range(AHEAD):
            tl.store(out_at + targets[column] * H * K * V, reached, mask=inside & (targets[column] >= 0))
            if decay_ptr is not None:
                reached *= tl.exp(decays[column])
                if composed_ptr is not None:
                    passed += decays[column]
            reached += states[column].to(tl.float32)
            for part in tl.static_range(1, PARTS):
                reached += others[column * (PARTS - 1) + part - 1].to(tl.float32)
    if composed_ptr is not None:
        tl.store(composed_at, passed, mask=writes)


@launched
@triton.jit(do_not_specialize=["length"])
def fold_matrix_kernel(
    states_ptr, matrix_ptr, initial_ptr, out_ptr, composed_ptr, sources_ptr, targets_ptr, first_ptr, length,
    states_stride_row, initial_stride_row, matrix_stride_row, matrix_stride_head, matrix_stride_i, matrix_stride_j,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Transitions are matrices [K, K] with any strides; products in three tf32 terms, near fp32. To compose them,
    the identity goes along the chain, in columns past those of the states."""
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    more: tl.constexpr = 0 if composed_ptr is None else (K + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0).to(tl.int64)
    chain, tile, head = program // (tiles + more), program % (tiles + more), tl.program_id(1).to(tl.int64)
    is_state = tile < tiles
    k, v = tl.arange(0, BLOCK_K), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside, inside_matrix = (k < K)[:, None] & (v < V)[None, :], (k < K)[:, None] & (k < K)[None, :]
    element = head * K * V + k[:, None] * V + v[None, :]
    matrix_ptr += head * matrix_stride_head + k[:, None] * matrix_stride_i + k[None, :] * matrix_stride_j
    sources_ptr += chain * length
    targets_ptr += chain * length

    reached = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    if initial_ptr is not None:
        first = tl.load(first_ptr + chain).to(tl.int64)
        initial_at = initial_ptr + first * initial_stride_row + element
        reached = tl.load(initial_at, mask=inside & (first >= 0), other=0.0)
    if composed_ptr is not None:
        column = v - tiles * BLOCK_V
        if not is_state:
            reached = (k[:, None] == column[None, :]).to(tl.float32)
    for step in range(0, length):
        target = tl.load(targets_ptr + step).to(tl.int64)
        tl.store(out_ptr + target * H * K * V + element, reached, mask=inside & (target >= 0) & is_state)
        source = tl.load(sources_ptr + step).to(tl.int64)
        if source >= 0:
            state = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
            if states_ptr is not None:
                state = tl.load(states_ptr + source * states_stride_row + element, mask=inside & is_state, other=0.0)
            matrix = tl.load(matrix_ptr + source * matrix_stride_row, mask=inside_matrix, other=0.0)
            reached = tl.dot(matrix, reached, state, input_precision="tf32x3")
    if composed_ptr is not None:
        at = composed_ptr + (chain * H + head) * K * K + k[:, None] * K + column[None, :]
        tl.store(at, reached, mask=(k < K)[:, None] & ((column >= 0) & (column < K))[None, :])
