"""Softmax and sparse layers as the core attention of Megatron's SelfAttention, which keeps its projections and norms."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from longspan.models.megatron.contexts import Contexts, is_packed, pack, unpack
from longspan.models.megatron.layer import own_module_state, place
from longspan.models.rope import rotate


class CoreAttention(MegatronModule):
    """Takes query [s, b, Hq, K], key and value [s, b, Hkv, K], or packed ones without b, of this rank's tokens and
    heads; gives [s, b, Hq K], or packed [t, Hq K].

    kind, model: a softmax or sparse kind of layer and the ModelConfig that has its settings. contexts: shared by all
    layers. rotary: turn queries and keys, by angles formed in fp64, which nobody else may do then.
    """

    def __init__(
        self, config, layer_number, attn_mask_type, *, kind, model, contexts: Contexts, rotary: bool, pg_collection=None,
        **unused,
    ):  # fmt: skip
        super().__init__(config)
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"attn_mask_type={attn_mask_type} is not causal; longspan's layers of text look back only")
        self.groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.model, self.contexts, self.rotary = model, contexts, rotary
        self.mixer = place(config, model, layer_number - 1, kind, self.groups.tp, projections=False)

    def forward(
        self, query, key, value, attention_mask=None, *, attn_mask_type=None, attention_bias=None,
        packed_seq_params=None,
    ):  # fmt: skip
        """attention_mask is what attn_mask_type says: it is not read."""
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by longspan's layers; use None")
        seq = self.contexts.of(query, packed_seq_params, self.groups.cp)
        if not is_packed(packed_seq_params):
            batch = query.shape[1]
            query, key, value = (pack(x) for x in (query, key, value))
        if self.rotary:
            angles = self.contexts.angles(seq, self.model, query.dtype)
            query, key = rotate(query, angles), rotate(key, angles)
        out = self.mixer.attend(query, key, value, seq).flatten(1)
        return out if is_packed(packed_seq_params) else unpack(out, batch)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return own_module_state(self, prefix, sharded_offsets, metadata)
