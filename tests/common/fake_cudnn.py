"""A stand-in for nvidia-cudnn-frontend on CPUs, as far as packed attention goes."""

import ctypes
from types import SimpleNamespace

import torch

from longspan.kernels.softmax import Pack
from longspan.kernels.softmax import math as math_backend


class FakeCudnn:
    """Its graphs read and write memory where their descriptions say: each sequence from its offset on, as long as the
    table of lengths says, and nothing else. `graphs` are those built so far."""

    data_type = SimpleNamespace(BFLOAT16=torch.bfloat16, HALF=torch.float16, FLOAT=torch.float32,
                                INT32=torch.int32, INT64=torch.int64)  # fmt: skip
    heur_mode = SimpleNamespace(A="A", FALLBACK="fallback")

    def __init__(self):
        self.graphs = []

    def pygraph(self, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert io_data_type in (torch.bfloat16, torch.float16)
        assert intermediate_data_type == compute_data_type == torch.float32 and handle == "handle"
        self.graphs.append(FakeGraph())
        return self.graphs[-1]


class FakeTensor:
    """dim, stride, data_type and ragged_offset of an operand; keys of what a graph is executed with."""

    def __init__(self, **description):
        self.__dict__ |= description

    def __getattr__(self, name):
        """set_dim(...) and the like."""
        assert name.startswith("set_"), name
        return lambda value: setattr(self, name.removeprefix("set_"), value)

    def read(self, pointers, offset, shape, strides):
        """The memory from `offset` on, as a tensor."""
        last = sum((size - 1) * stride for size, stride in zip(shape, strides))
        address = pointers[self] + offset * self.data_type.itemsize
        memory = (ctypes.c_char * ((last + 1) * self.data_type.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=self.data_type).as_strided(shape, strides)

    def table(self, pointers, length):
        assert self.dim == [length, 1, 1, 1] and self.stride == [1, 1, 1, 1]
        return self.read(pointers, 0, (length,), (1,)).tolist()


class FakeGraph:
    """One attention, forward or backward."""

    def __init__(self):
        self.built = False

    def tensor(self, name, **description):
        return FakeTensor(**description)

    def sdpa(self, *, generate_stats, **arguments):
        assert generate_stats
        return self.call(2, **arguments)

    def sdpa_backward(self, *, max_total_seq_len_q, max_total_seq_len_kv, **arguments):
        self.room = max_total_seq_len_q, max_total_seq_len_kv
        return self.call(3, **arguments)

    def call(self, num_results, *, attn_scale, use_causal_mask, use_padding_mask, seq_len_q, seq_len_kv, **operands):
        assert use_padding_mask
        self.scale, self.causal, self.lengths = attn_scale, use_causal_mask, (seq_len_q, seq_len_kv)
        self.operands, self.results = operands, [FakeTensor() for _ in range(num_results)]
        return self.results

    def build(self, heuristics):
        assert heuristics == ["A", "fallback"] and all(result.output for result in self.results)
        self.built = True

    def get_workspace_size(self):
        return 1

    def execute(self, pointers, workspace, handle):
        assert self.built and handle == "handle"
        batch, greatest = self.operands["q"].dim[0], [self.operands[name].dim[2] for name in "qk"]
        lengths = [table.table(pointers, batch) for table in self.lengths]
        assert all(max(found) <= most for found, most in zip(lengths, greatest))
        if len(self.results) == 3:
            assert all(sum(found) <= most for found, most in zip(lengths, self.room))

        def rows(tensor, index, length):
            dim, (_, head, row, unit) = tensor.dim, tensor.stride
            assert dim[0] == batch and dim[2] >= 128 and unit == 1
            if dim[3] > 1:  # by the copy engine
                assert pointers[tensor] % 16 == 0 and min(head, row) > 0 and head % 8 == row % 8 == 0
            start = tensor.ragged_offset.table(pointers, batch + 1)[index]
            return tensor.read(pointers, start, (length, dim[1], dim[3]), (row, head, 1))

        for index, (length_q, length_k) in enumerate(zip(*lengths, strict=True)):
            if not length_q:
                assert not length_k
                continue
            pack = Pack((0, length_q), (0, length_k), self.causal)
            named = {name: rows(x, index, length_k if name in "kv" else length_q) for name, x in self.operands.items()}
            if "stats" in named:
                assert self.operands["o"].stride == self.operands["dO"].stride
                q, dq = self.operands["q"], self.results[0]
                assert q.stride == dq.stride and q.ragged_offset is dq.ragged_offset
                named["stats"] = named["stats"].squeeze(-1)
                order, function, sides = ("dO", "q", "k", "v", "o", "stats"), math_backend.backward, "qkk"
            else:
                order, function, sides = ("q", "k", "v"), math_backend.forward, "qq"
            found = function(*(named[name] for name in order), pack, self.scale)
            for result, side, value in zip(self.results, sides, found, strict=True):
                memory = rows(result, index, {"q": length_q, "k": length_k}[side])
                memory.copy_(value.view(memory.shape))
