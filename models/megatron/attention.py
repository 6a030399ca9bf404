"""What Megatron builds: softmax and sparse layers as core attention, linear ones in the place of SelfAttention."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import _split_tensor_factory
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from longspan.models.megatron.contexts import Contexts, is_packed, pack, unpack
from longspan.models.megatron.own_heads import own_dim, own_mixer
from longspan.models.rope import rotate
from longspan.models.tensor_parallel import streams


class _Mixing(MegatronModule):
    """A module with a mixer of this rank's heads.

    kind, model: a kind of layer and the ModelConfig that has its settings. contexts: shared by all layers. rotary:
    queries and keys of softmax and sparse layers are turned here, by angles formed in fp64.
    """

    projections: bool  # whether the mixer has its own

    def __init__(self, config, layer_number, *, kind, model, contexts: Contexts, rotary: bool, pg_collection=None):
        super().__init__(config)
        self.groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.model, self.contexts, self.rotary = model, contexts, rotary
        self.mixer = own_mixer(
            model,
            layer_number - 1,
            kind,
            self.groups.tp,
            projections=self.projections,
            device="cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
            dtype=config.params_dtype,
        )

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Parts of weights as parts of the whole: a checkpoint fits any number of tensor-parallel ranks."""
        state = self.state_dict(keep_vars=True)
        dims = {name: own_dim(name.removeprefix("mixer.")) for name in state}
        sharded = make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {name: dim for name, dim in dims.items() if dim is not None},
            sharded_offsets,
            tp_group=self.groups.tp,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        if channels := streams(self.mixer):  # parts of the same stream belong together, not those of the same rank
            name = f"{prefix}mixer.conv.weight"
            sharded[name] = _split_tensor_factory(sharded[name], channels, ["query", "key", "value"], 0)
        return sharded


class CoreAttention(_Mixing):
    """Takes query [s, b, Hq, K], key and value [s, b, Hkv, K], or packed ones without b, of this rank's tokens and
    heads; gives [s, b, Hq K], or packed [t, Hq K]."""

    projections = False

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type=None, cp_comm_type=None, softmax_scale=None, **given
    ):
        super().__init__(config, layer_number, **given)
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"attn_mask_type={attn_mask_type} is not causal; longspan's layers of text look back only")

    def forward(
        self, query, key, value, attention_mask=None, *, attn_mask_type=None, attention_bias=None,
        packed_seq_params=None,
    ):  # fmt: skip
        """attention_mask is what attn_mask_type says: it is not read."""
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by longspan's layers; use None")
        seq = self.contexts.of(query, packed_seq_params, self.groups.cp)
        packed = is_packed(packed_seq_params)
        q_THK, k_THK, v_THK = (x if packed else pack(x) for x in (query, key, value))
        if self.rotary:
            angles = self.contexts.angles(seq, self.model, query.dtype)
            q_THK, k_THK = rotate(q_THK, angles), rotate(k_THK, angles)
        out_TD = self.mixer.attend(q_THK, k_THK, v_THK, seq).flatten(1)
        return out_TD if packed else unpack(out_TD, query.shape[1])


class LinearAttention(_Mixing):
    """Hidden states [s, b, D] (packed: b = 1) -> the same, and no bias. Gates, decays and beta are read from them."""

    projections = True

    def __init__(self, config, layer_number, cp_comm_type=None, **given):
        super().__init__(config, layer_number, **given)

    def forward(
        self, hidden_states, attention_mask=None, *, inference_context=None, attention_bias=None, rotary_pos_emb=None,
        packed_seq_params=None, **unused,
    ):  # fmt: skip
        """attention_mask is causal: it is not read. Linear layers have no positions."""
        if inference_context is not None or attention_bias is not None:
            name = "attention_bias" if inference_context is None else "inference_context"
            raise ValueError(f"{name} is not supported by longspan's linear layers, which are for training; use None")
        if rotary_pos_emb is not None and self.rotary:
            raise ValueError(
                "queries and keys would be turned twice: with rope='longspan' give GPTModel"
                " position_embedding_type='none'"
            )
        tp, batch, sequence_parallel = self.groups.tp, hidden_states.shape[1], self.config.sequence_parallel
        if sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=tp)
        seq = self.contexts.of(hidden_states, packed_seq_params, self.groups.cp)
        x_TD = pack(hidden_states)
        if not sequence_parallel:  # behind `pack`: Megatron's reductions need contiguous tensors
            x_TD = copy_to_tensor_model_parallel_region(x_TD, group=tp)
        out_TD = self.mixer(x_TD, None, seq)
        if sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(unpack(out_TD, batch), group=tp), None
        return unpack(reduce_from_tensor_model_parallel_region(out_TD, group=tp), batch), None
