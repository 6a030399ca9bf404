"""Decays per key channel inside one chunk of C tokens: what the channel kernels share.

With G the inclusive cumulative log decay, tokens j <= i meet with weight exp(G_i - G_j) in every channel. For products
of matrices the weight has to be split in two factors, one per token:

mild    where a whole chunk decays by no less than exp(-MILD), both factors are measured from half the chunk's decay:
        no exponent is above MILD / 2, everything fits fp32 and bf16, and one product gives all pairs.
strong  elsewhere, a tree: on level n the chunk is cut in blocks of 2^(n + 1) tokens, and tokens of a block's second
        half meet those of its first half. Both factors are measured from the middle, so that neither is above one.
        Every pair i > j meets on exactly one level, and i = j meets without decay. The factors are products of decays
        (`climb`), never differences of logs: no gate, not even log decay -inf, is too strong or costs accuracy.
"""

from longspan.kernels.compiler import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
MILD = tl.constexpr(120.0)


@triton.jit
def chunk_tokens(C: tl.constexpr):
    """The token in each row of a tile of scores or of what makes them: row r holds token C / 8 (r % 8) + r / 8. A
    thread mostly holds rows 8 apart, so that sums along neighbouring tokens stay within threads."""
    row = tl.arange(0, C)
    return row % 8 * (C // 8) + row // 8


@triton.jit
def load_rows(ptr, stride, token, column, length, WIDTH: tl.constexpr):
    """[tokens, columns] of a tensor whose rows lie `stride` apart; zero outside."""
    at = ptr + token[:, None].to(tl.int64) * stride + column[None, :]
    return tl.load(at, mask=(token < length)[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, stride, token, column, length, value, WIDTH: tl.constexpr):
    at = ptr + token[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=(token < length)[:, None] & (column < WIDTH)[None, :])


@triton.jit
def factor(x, work: tl.constexpr, PRECISION: tl.constexpr):
    """x as a product will take it, for use beside that product: in `work`, and for tf32 rounded to its 11 bits."""
    x = x.to(work)
    if PRECISION == "tf32" and work == tl.float32:
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # NaN would turn into zero
    return x


@triton.jit
def running_sum(x, reads, work: tl.constexpr):
    """Row i of the result is the sum of the rows that i reads, [C, C]. For bf16 x is taken to 16 bits."""
    if work == tl.bfloat16:
        high = x.to(tl.bfloat16)
        result = tl.dot(reads.to(tl.bfloat16), (x - high.to(tl.float32)).to(tl.bfloat16))
        return tl.dot(reads.to(tl.bfloat16), high, result)
    return tl.dot(reads.to(tl.float32), x, input_precision="tf32x3")


@triton.jit
def is_mild(total):
    """total [channels]: log decay of a whole chunk. One answer for all channels; no for -inf."""
    return tl.min(total, 0) >= -MILD


@triton.jit
def is_second(token, level):
    """[C, 1]: whether a token is in the second half of its block."""
    return ((token >> level) & 1)[:, None] == 1


@triton.jit
def meets(token, level):
    """[C, C]: whether two tokens are in different halves of one block."""
    return ((token >> level)[:, None] ^ (token >> level)[None, :]) == 1


@triton.jit
def climb(passed, from_start, to_end, sibling, second):
    """From blocks to blocks twice as long: the decay over each token's whole block, from the block's start to the
    token, its own included, and from after the token to the block's end. For blocks of one token they are the token's
    decay, the same, and one. sibling [C]: the row of a token in the other half; second: from is_second."""
    other = tl.gather(passed, tl.broadcast_to(sibling[:, None], passed.shape), 0)
    return passed * other, tl.where(second, from_start * other, from_start), tl.where(second, to_end, to_end * other)
