"""The MLP half of a block computed tile by tile over tokens, in the forward and again in the backward.

What a gated MLP holds inside is several times as wide as the residual stream, and at a million tokens larger than all
else in a layer. Here it exists for one tile at a time: the forward keeps the half's inputs, the backward computes each
tile again and takes its gradients before the next one (tiled computation as in arXiv 2506.13996).
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from longspan.attention.ranges import RECOMPUTED, component
from longspan.attention.recompute import recomputing
from longspan.kernels.segment_rows import Runs
from longspan.kernels.wide import wide_dtype
from longspan.parallel.layout import Layout


@dataclass(frozen=True)
class Tile:
    """Some of this rank's tokens (rows), and the runs that they belong to: their numbers, and what of them is here."""

    rows: slice
    numbers: slice
    runs: Runs


@dataclass(frozen=True)
class Tiles:
    tiles: tuple[Tile, ...]

    def map(self, move) -> "Tiles":
        """The same with every tensor passed through `move`."""
        return Tiles(tuple(Tile(tile.rows, tile.numbers, tile.runs.map(move)) for tile in self.tiles))


def runs_in_tiles(layout: Layout, rank: int, size: int) -> Tiles:
    """The tokens of `rank`, `size` at a time, with the spans of the layout as runs."""
    offsets = layout.local_offsets(rank)
    return Tiles(tuple(_tile(offsets, rows) for rows in _cut(offsets[-1], size)))


def _tile(offsets, rows):
    numbers = slice(bisect_right(offsets, rows.start) - 1, bisect_left(offsets, rows.stop))
    runs = Runs.of([max(0, start - rows.start) for start in offsets[numbers]] + [rows.stop - rows.start])
    return Tile(rows, numbers, runs)


def _cut(tokens, size):
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


@torch.compiler.disable
def feed_in_tiles(block, per_token: tuple, per_run: tuple = (), seq=None) -> torch.Tensor:
    """block.feed(*per_token), for at most block.mlp_tile tokens at a time; with `seq` block.feed(*per_token, *per_run,
    runs), where runs are those of the tile's tokens.

    per_token: tensors [T, ...], the first of which has the shape and dtype of the result; per_run: tensors [S, ...] of
    the spans of seq.layout on this rank. block.feed uses the parameters of block.mlp_norm and block.mlp. Gradients of
    parameters and per_run are summed over tiles in at least fp32. Inside a checkpoint it has to be the last thing that
    is computed.
    """
    if seq is None:
        tiles = [Tile(rows, slice(0), None) for rows in _cut(len(per_token[0]), block.mlp_tile)]
    else:
        tiles = seq.derive(runs_in_tiles, block.mlp_tile).tiles
    return _Tiles.apply(block, tiles, len(per_token), *per_token, *per_run, *_parameters(block))


def _parameters(block):
    # Looked up each time: a sharded module has its whole parameters only while it runs.
    return [*block.mlp_norm.parameters(), *block.mlp.parameters()]


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, tiles, num_per_token, *inputs):
        inputs = inputs[: len(inputs) - len(_parameters(block))]
        ctx.block, ctx.tiles, ctx.num_per_token = block, tiles, num_per_token
        ctx.save_for_backward(*inputs)
        x_TD = inputs[0]
        if recomputing():  # only the inputs are asked for; nobody reads the block's output
            return x_TD.new_empty(1).expand(x_TD.shape)
        out_TD = torch.empty_like(x_TD)
        for tile in block.visit_tiles(tiles):
            places = _places(tile, num_per_token, inputs)
            out_TD[tile.rows] = block.feed(*(x[place] for x, place in zip(inputs, places)), *_runs(tile))
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out_TD):
        block, split, inputs, needed = ctx.block, ctx.num_per_token, ctx.saved_tensors, ctx.needs_input_grad[3:]
        whole = [*inputs, *_parameters(block)]
        grads = [
            None if not need
            else torch.empty_like(x) if number < split
            else torch.zeros_like(x, dtype=wide_dtype(x.dtype))
            for number, (x, need) in enumerate(zip(whole, needed))
        ]  # fmt: skip
        for tile in block.visit_tiles(ctx.tiles):
            places = _places(tile, split, inputs)
            parts = [x[place].detach().requires_grad_(need) for x, place, need in zip(inputs, places, needed)]
            with torch.enable_grad(), component(RECOMPUTED):
                out = block.feed(*parts, *_runs(tile))
            wanted = [x for x, need in zip((*parts, *whole[len(parts) :]), needed) if need]
            found = iter(torch.autograd.grad(out, wanted, d_out_TD[tile.rows]))
            for number, grad in enumerate(grads):
                if grad is None:
                    continue
                if number < split:
                    grad[tile.rows] = next(found)
                elif number < len(inputs):
                    grad[tile.numbers] += next(found)
                else:
                    grad += next(found)
        return None, None, None, *(None if grad is None else grad.to(x.dtype) for grad, x in zip(grads, whole))


def _places(tile, num_per_token, inputs):
    """Where in each of the inputs a tile's part is."""
    return [tile.rows] * num_per_token + [tile.numbers] * (len(inputs) - num_per_token)


def _runs(tile):
    return () if tile.runs is None else (tile.runs,)
