"""Windows of keys and values that other ranks read and return gradients to: what they take, and their sizes."""


def fits(head_dim: int, itemsize: int) -> bool:
    """Whether rows are whole numbers of what a thread moves, 16 bytes."""
    return head_dim * itemsize % 16 == 0


def window_bytes(tokens: int, ranks: int, key_heads: int, head_dim: int, itemsize: int) -> tuple[int, int]:
    """Bytes of a rank's window: of its keys and values [2, tokens, H, D], and of gradients that others return for them
    [2, ranks - 1, lists, tokens, heads of a list, D]. tokens: of the rank that has most."""
    one = 2 * tokens * key_heads * head_dim * itemsize
    return one, (ranks - 1) * one
