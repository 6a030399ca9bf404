"""What sparse_attention and its selections refuse, in one line."""

import pytest
import torch

from longspan.attention import (
    Antidiagonal,
    BlockLists,
    CompressedTop,
    Hierarchical,
    Radial,
    TokenTop,
    TopBlocks,
    Window,
    sparse_attention,
)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"selection": 5}, "selection is a int; give one such as TopBlocks(...) or Window(...)"),
        ({"v": torch.zeros(8, 2, 3)}, "k has shape (8, 2, 4) but v has (8, 2, 3); they must be equal"),
        ({"q": torch.zeros(8, 4, 5)}, "k has shape (8, 2, 4); its head_dim must be that of q, (8, 4, 5)"),
        ({"q": torch.zeros(8, 3, 4)}, "k has 2 heads, which does not divide the 3 heads of q"),
        (
            {"selection": Window((3, 3), (2, 3))},
            "a document of 8 tokens does not fit Window.shape=(2, 3), which has 6 places; use 0 for the first axis",
        ),
        (
            {"selection": BlockLists([[[0]]] * 2, 8, 4)},
            "BlockLists.lists has 2 documents, the batch has 1",
        ),
        (
            {"selection": BlockLists([[[0]]], 4, 4)},
            "BlockLists.lists gives int64 [1, 1] for document 0 of 8 tokens; give integers [2, n] or [key heads, 2, n]",
        ),
        (
            {"selection": BlockLists([[[2, 1]]], 8, 4)},
            "BlockLists.lists names block 2 in document 0 of 8 tokens; it has 2 blocks of 4",
        ),
        (
            {"selection": BlockLists([[[1, 0, 1]]], 8, 4)},
            "BlockLists.lists names block 1 twice in a list of document 0",
        ),
        (
            {"selection": BlockLists([[[[1]]] * 3], 8, 4)},
            "BlockLists.lists has lists of 3 heads for 2 key heads",
        ),
        ({"strategy": "rign"}, "sparse strategy 'rign' is unknown; use auto, fetch, ring; did you mean 'ring'?"),
    ],
)
def test_refusals(change, message):
    given = {"q": torch.zeros(8, 4, 4), "k": torch.zeros(8, 2, 4), "v": torch.zeros(8, 2, 4), "selection": TopBlocks()}
    with pytest.raises(ValueError) as error:
        sparse_attention(**given | change)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TopBlocks(0), "TopBlocks.keep=0 must be a whole number of blocks or a share between 0 and 1"),
        (lambda: TopBlocks(2.5), "TopBlocks.keep=2.5 must be a whole number of blocks or a share between 0 and 1"),
        (lambda: TopBlocks(query_block=0), "TopBlocks.query_block=0 must be a whole number of at least 1"),
        (lambda: TopBlocks(2, first=2, recent=1), "TopBlocks.keep=2 must be at least first + recent, 3"),
        (
            lambda: Window((3, 3)),
            "Window.window=(3, 3) and Window.shape=(0,) must have the same 1 to 3 axes",
        ),
        (
            lambda: Window((3, 0), (0, 4)),
            "Window.window=(3, 0) and Window.shape=(0, 4) must be whole numbers of at least 1 on every axis; only the"
            " first of shape may be 0, as long as a document needs",
        ),
        (
            lambda: Window(2.5),
            "Window.window=(2.5,) and Window.shape=(0,) must be whole numbers of at least 1 on every axis; only the"
            " first of shape may be 0, as long as a document needs",
        ),
        (lambda: Window(3, order="z"), "Window.order='z' is unknown; use row_major or morton"),
        (lambda: Window(3, causal_axes=(1, 0)), "Window.causal_axes=(1, 0) must have a flag for each axis of (3,)"),
        (lambda: Radial(0), "Radial.frame=0 must be a whole number of at least 1"),
        (lambda: Antidiagonal(0.0), "Antidiagonal.threshold=0.0 must be a share above 0, at most 1"),
        (
            lambda: Antidiagonal(stride=16, key_block=72),
            "Antidiagonal.key_block=72 must be a multiple of stride=16",
        ),
        (lambda: TokenTop(True), "TokenTop.keep=True must be a whole number of at least 1"),
        (
            lambda: CompressedTop(window=24),
            "CompressedTop.window=24 must be a multiple of stride=16 and at most key_block=64, another multiple",
        ),
        (lambda: CompressedTop(2), "CompressedTop.keep=2 must be at least first + recent, 3"),
        (lambda: Hierarchical(1), "Hierarchical.block=1 must be a whole number of at least 2"),
        (lambda: Hierarchical(levels=0), "Hierarchical.levels=0 must be a whole number of at least 1"),
    ],
)
def test_selections_refuse(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message
