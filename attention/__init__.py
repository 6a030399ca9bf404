"""Attention layers across ranks, as autograd functions over packed tokens."""

from longspan.attention.antidiagonal import Antidiagonal
from longspan.attention.convolution import short_convolution
from longspan.attention.hierarchy import Hierarchical
from longspan.attention.linear import linear_attention
from longspan.attention.linear_branch import LinearBranch
from longspan.attention.selection import Selection
from longspan.attention.selections import TopBlocks
from longspan.attention.softmax import softmax_attention
from longspan.attention.sparse import sparse_attention
from longspan.attention.static_blocks import BlockLists, Radial
from longspan.attention.token_blocks import CompressedTop, TokenTop
from longspan.attention.windows import Window

__all__ = [
    "Antidiagonal",
    "BlockLists",
    "CompressedTop",
    "Hierarchical",
    "LinearBranch",
    "Radial",
    "Selection",
    "TokenTop",
    "TopBlocks",
    "Window",
    "linear_attention",
    "short_convolution",
    "softmax_attention",
    "sparse_attention",
]
