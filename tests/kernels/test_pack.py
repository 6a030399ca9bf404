"""Pack: sequences laid end to end, as back ends get them."""

import pytest
import torch

from longspan.kernels.softmax import Pack


@pytest.mark.parametrize(
    "arguments", [((0, 3), (0, 4), True), ((0, 3, 3), (0, 1, 2), False), ((1, 3), (0, 2), False), ((0,), (0,), False)]
)
def test_pack_is_validated(arguments):
    with pytest.raises(AssertionError):
        Pack(*arguments)


def test_pack_copies_offsets_once():
    pack = Pack((0, 3, 5), (0, 4, 9), False)
    assert (pack.num_sequences, pack.max_q, pack.max_k) == (2, 3, 5)
    assert pack.cu_k_tensor("cpu") is pack.cu_k_tensor(torch.device("cpu"))
    assert pack.cu_q_tensor("cpu").tolist() == [0, 3, 5] and pack.cu_q_tensor("cpu").dtype == torch.int32
    assert pack == Pack((0, 3, 5), (0, 4, 9), False)


def test_pack_fills_tables_with_empty_sequences():
    pack = Pack((0, 3, 5, 6), (0, 4, 9, 10), False)
    offsets, lengths = pack.offsets_tensor("k", 24, 4, "cpu"), pack.lengths_tensor("q", 4, "cpu")
    assert offsets.tolist() == [0, 96, 216, 240, 240] and offsets.dtype == torch.int64
    assert lengths.tolist() == [3, 2, 1, 0] and lengths.dtype == torch.int32
    assert offsets is pack.offsets_tensor("k", 24, 4, torch.device("cpu"))
    assert pack.offsets_tensor("k", 1 << 30, 4, "cpu").tolist()[-1] == 10 << 30
