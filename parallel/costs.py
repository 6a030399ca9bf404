"""What softmax attention costs on a machine: seconds of its arithmetic, of moving keys, and of moving tokens.

Everything is of one layer, forward and backward. A rank that holds x query tokens of a document works on them for
pair_s * (pairs + start_tokens * pairs / x): its kernels lose as much as start_tokens more query tokens would take.
"""

from dataclasses import dataclass, fields, replace
from math import inf

import numpy as np

from longspan.parallel.geometry import Mask
from longspan.parallel.layout import Layout
from longspan.parallel.topology import Topology

KEY_PASSES = 3  # keys and values travel forward, again backward, and their gradients travel home
REMAP_PASSES = 2  # q, k, v and o forward, their gradients backward
LINK_RATE, REMOTE_RATE = 300e9, 45e9  # bytes per second of one H200 to others of its node, and to other nodes
COPY_RATE = 2.5e12  # bytes per second, of rows gathered on an H200


@dataclass(frozen=True)
class Costs:
    """Defaults: H200, bf16, 32 query and 8 key heads of 128. `h200` gives those of other heads, `pairs_only` counts
    query-key pairs and nothing else.

    pair_s: seconds per visible query-key pair, all heads. start_tokens: see above. key_s: per token whose keys and
    values arrive from a rank of the same node; remote_key_s: from another node, over the link of one rank. token_s,
    remote_token_s: the same per token that is remapped for the layer and back. row_s: per token on a rank, whether it
    moves or not, for copies of its rows in other orders where any are remapped. min_shard: a document is not cut into
    pieces of fewer tokens where that can be helped. Raises ValueError for numbers that are none of these.
    """

    pair_s: float = 9.29e-11
    start_tokens: int = 860
    key_s: float = 4.1e-8
    remote_key_s: float = 2.73e-7
    token_s: float = 1.37e-7
    remote_token_s: float = 9.1e-7
    min_shard: int = 256
    row_s: float = 8.5e-8

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1 << 40:
                    raise ValueError(f"Costs.{field.name}={value!r} must be a whole number from 0 to 2**40")
            elif not isinstance(value, (int, float)) or not 0 <= value <= 1e6 or (field.name == "pair_s" and not value):
                least = "above 0" if field.name == "pair_s" else "from 0"
                raise ValueError(f"Costs.{field.name}={value!r} must be a number of seconds {least}, up to 1e6")

    def keys(self, mask: Mask, topology: Topology) -> "Keys":
        """Keys come to a node once, over the links of all its ranks (parallel.routing), and go on inside. Of a window,
        a rank sees those before each of its two parts at most; if one rank sees them all, they may use one link."""
        share = visible_share(mask)
        keys = Keys(share * self.key_s, share * self.remote_key_s / topology.ranks_per_node)
        if mask.window is None:
            return keys
        most = 2 * (mask.window - 1)
        return replace(keys, most_near=most * self.key_s, most_cross=most * self.remote_key_s)

    def weights(self, mask: Mask, lengths) -> np.ndarray:
        """fp64, of every document: x of its tokens are weight * (x + start_tokens) seconds of work, on average."""
        lengths = np.array(lengths)
        return self.pair_s * mask.pairs_between(0, lengths, lengths) / lengths

    @classmethod
    def pairs_only(cls) -> "Costs":
        return cls(1.0, 0, 0.0, 0.0, 0.0, 0.0, 1, 0.0)

    @classmethod
    def h200(cls, heads: int, kv_heads: int, head_dim: int, bytes_per_number: int = 2) -> "Costs":
        """FlashAttention-4 at 617 TFLOP/s on one document of 131,072 tokens and 510 on eight of 4,096 (forward and
        backward); 300 GB/s between GPUs of a node and 45 GB/s, 90 % of a 400 Gb/s link, between nodes."""
        pair_s = 3.5 * 4 * heads * head_dim / 617e12
        keys = key_bytes(kv_heads, head_dim, bytes_per_number)
        tokens = token_bytes(heads, kv_heads, head_dim, bytes_per_number)
        intra, inter = 1 / LINK_RATE, 1 / REMOTE_RATE
        # Read and written: q, k and v side by side, as sent and as received; o as sent and as received; and backward.
        copies = 2 * (6 * (heads + 2 * kv_heads) + 4 * heads) * head_dim * bytes_per_number
        links = keys * intra, keys * inter, tokens * intra, tokens * inter
        return cls(pair_s, 860, *links, row_s=copies / COPY_RATE)


def key_bytes(kv_heads: int, head_dim: int, bytes_per_number: int) -> int:
    """Of one token's keys and values, in all their passes."""
    return KEY_PASSES * 2 * kv_heads * head_dim * bytes_per_number


def token_bytes(heads: int, kv_heads: int, head_dim: int, bytes_per_number: int) -> int:
    """Of one token that is remapped and back, in both directions of a layer."""
    return REMAP_PASSES * 2 * (heads + kv_heads) * head_dim * bytes_per_number


@dataclass(frozen=True)
class Keys:
    """Seconds for keys of a document that other ranks hold, from above: per token for a rank that sees them (near), per
    token that crosses to a node (cross), and at most, however many tokens those are."""

    near: float = 0.0
    cross: float = 0.0
    most_near: float = inf
    most_cross: float = inf

    def near_s(self, tokens):
        return np.minimum(tokens * self.near, self.most_near)

    def cross_s(self, tokens):
        return np.minimum(tokens * self.cross, self.most_cross)

    def far_s(self, tokens):
        """For tokens that other nodes hold."""
        return self.near_s(tokens) + self.cross_s(tokens)


@dataclass(frozen=True)
class Predicted:
    """Seconds of each rank: attention; keys that arrive, or cross to its node over its link; tokens remapped for the
    layer and back."""

    attention_s: tuple[float, ...]
    keys_s: tuple[float, ...]
    remap_s: tuple[float, ...]

    @property
    def exposed_s(self) -> tuple[float, ...]:
        """What of the keys' transfer cannot hide behind attention."""
        return tuple(max(keys - attention, 0.0) for keys, attention in zip(self.keys_s, self.attention_s))

    @property
    def slowest_s(self) -> float:
        """Until the last rank is done; all wait for one another before and after the remap."""
        together = max(attention + exposed for attention, exposed in zip(self.attention_s, self.exposed_s))
        return together + max(self.remap_s)

    @property
    def imbalance(self) -> float:
        """The slowest rank's attention over the mean."""
        mean = sum(self.attention_s) / len(self.attention_s)
        return max(self.attention_s) / mean if mean else 1.0


def visible_share(mask: Mask) -> float:
    """Without a window: of a document's tokens that other ranks hold, the share whose keys a rank with a head and a
    tail part sees. Of those inside its own all, of those outside the head half."""
    return 0.75 if mask.causal else 1.0


def predict(layout: Layout, topology: Topology, costs: Costs, mask: Mask = Mask()) -> Predicted:
    """What a layout costs."""
    if topology.world_size != layout.world_size:
        raise ValueError(f"the layout has {layout.world_size} ranks but {topology} has {topology.world_size}")
    lengths = np.array(layout.lengths)
    columns = [(s.document, rank, s.start, s.stop) for rank, spans in enumerate(layout.spans) for s in spans]
    documents, ranks, start, stop = np.array(columns).T
    shards, shard = np.unique(documents * layout.world_size + ranks, return_inverse=True)
    tokens = np.bincount(shard, stop - start)
    work = np.bincount(shard, mask.pairs_between(start, stop, lengths[documents]))
    documents, ranks = np.divmod(shards, layout.world_size)
    attention = np.zeros(layout.world_size)
    np.add.at(attention, ranks, costs.pair_s * work * (1 + costs.start_tokens / tokens))

    nodes = ranks // topology.ranks_per_node
    on_node = np.zeros((len(layout.lengths), topology.nodes))
    np.add.at(on_node, (documents, nodes), tokens)
    near = on_node[documents, nodes] - tokens
    elsewhere = np.where(on_node > 0, lengths[:, None] - on_node, 0.0)
    far = elsewhere[documents, nodes]
    seconds = costs.keys(mask, topology)
    # All ranks of a node carry, and wait for, what crosses to it, whichever of them sees it.
    keys = np.repeat(seconds.cross_s(elsewhere).sum(0), topology.ranks_per_node)
    np.add.at(keys, ranks, seconds.near_s(near + far))
    remap = remap_seconds(np.array(layout.tokens_per_rank), topology, costs)
    return Predicted(tuple(attention.tolist()), tuple(keys.tolist()), tuple(remap.tolist()))


def remap_seconds(tokens: np.ndarray, topology: Topology, costs: Costs) -> np.ndarray:
    """Per rank, for what it has above or below the mean. What a node has too much or too little crosses nodes, over the
    links of all its ranks."""
    mean = tokens.mean()
    on_node = tokens.reshape(topology.nodes, -1).sum(1)  # of whole numbers: the same on every machine
    crossing = np.abs(on_node / topology.ranks_per_node - mean)
    excess = np.abs(tokens - mean)
    excess[excess < 1] = 0  # the mean is no whole number
    crossing[crossing < 1] = 0
    rows = np.where(excess.any(), tokens * costs.row_s, 0.0)
    return rows + excess * costs.token_s + np.repeat(crossing, topology.ranks_per_node) * costs.remote_token_s
