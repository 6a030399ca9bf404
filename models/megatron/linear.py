"""Linear layers in the place of Megatron's SelfAttention: gates, decays and beta are read from hidden states."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule

from longspan.models.megatron.contexts import Contexts, pack, unpack
from longspan.models.megatron.layer import own_module_state, place


class LinearAttention(MegatronModule):
    """hidden states [s, b, D] (packed: b = 1) -> the same, and no bias.

    kind, model: a linear kind of layer and the ModelConfig that has its settings. contexts: shared by all layers.
    """

    def __init__(self, config, layer_number, *, kind, model, contexts: Contexts, pg_collection=None, **unused):
        super().__init__(config)
        self.groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.contexts = contexts
        self.mixer = place(config, model, layer_number - 1, kind, self.groups.tp, projections=True)

    def forward(
        self, hidden_states, attention_mask=None, *, inference_context=None, attention_bias=None,
        packed_seq_params=None, **unused,
    ):  # fmt: skip
        """attention_mask is causal: it is not read."""
        if inference_context is not None or attention_bias is not None:
            name = "attention_bias" if inference_context is None else "inference_context"
            raise ValueError(f"{name} is not supported by longspan's linear layers, which are for training; use None")
        tp, batch, sequence_parallel = self.groups.tp, hidden_states.shape[1], self.config.sequence_parallel
        if sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=tp)
        seq = self.contexts.of(hidden_states, packed_seq_params, self.groups.cp)
        x_TD = pack(hidden_states)
        if not sequence_parallel:  # behind `pack`: Megatron's reductions want contiguous tensors
            x_TD = copy_to_tensor_model_parallel_region(x_TD, group=tp)
        out_TD = self.mixer(x_TD, None, seq)
        if sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(unpack(out_TD, batch), group=tp), None
        return unpack(reduce_from_tensor_model_parallel_region(out_TD, group=tp), batch), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return own_module_state(self, prefix, sharded_offsets, metadata)
