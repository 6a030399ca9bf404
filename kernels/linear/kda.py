"""KDA (Kimi Delta Attention, arXiv 2510.26692), the delta rule with a decay per key channel, in fused Triton kernels.

`kda_prepare` puts all decays into the operands, after which the recurrences are those of the delta rule
(`delta_forward`, `delta_backward`), but for exp(G_C) being a vector. Formulas: docs/linear-attention.md.
"""

from longspan.kernels.linear.delta import Delta
from longspan.kernels.linear.kda_gradients import input_gradients
from longspan.kernels.linear.kda_prepare import prepare, swept
from longspan.kernels.linear.splits import unit_stride


class KDA(Delta):
    """The Form (kernels.linear.form) of the delta rule with a decay per key channel on CUDA: K and V up to 128, bf16 or
    fp32."""

    per_channel = True

    def __init__(self, tables, q, k, v, log_decay, beta, scale):
        assert max(k.shape[2], v.shape[2]) <= 128, (k.shape, v.shape)
        super().__init__(tables, q, k, v, unit_stride(log_decay), beta, scale)

    def output(self, entry, dtype):
        out, saved = super().output(entry, dtype)
        return out, (*saved, self.call.q, self.call.k, self.call.write, self.call.total)

    def start_backward(self, saved, d_out, gate):
        *saved, query, read, write, total = saved
        super().start_backward(saved, d_out, gate)
        self.call = swept(self.inputs, query, read, write, total)

    def _prepare(self):
        self.call, self.prepared = prepare(self.inputs)

    def _input_gradients(self, exits):
        return input_gradients(self.inputs, self.call, self.prepared, self.d_out, self.entering, exits, self.gate)
