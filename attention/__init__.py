"""Attention layers across ranks, as autograd functions over packed tokens."""

from longspan.attention.convolution import short_convolution
from longspan.attention.hierarchy import Hierarchical
from longspan.attention.linear import linear_attention
from longspan.attention.linear_branch import LinearBranch
from longspan.attention.selections import TopBlocks
from longspan.attention.softmax import softmax_attention
from longspan.attention.sparse import sparse_attention

__all__ = [
    "Hierarchical",
    "LinearBranch",
    "TopBlocks",
    "linear_attention",
    "short_convolution",
    "softmax_attention",
    "sparse_attention",
]
