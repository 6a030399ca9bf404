"""What Megatron modules with a mixer inside share: how they are made and how checkpoints see their weights."""

import torch
from megatron.core.ssm.gated_delta_net import _split_tensor_factory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from longspan.models.megatron.own_heads import own_dim, own_mixer, streams


def place(config, model, layer: int, kind: str, group, *, projections: bool):
    """The mixer with this rank's heads, on the device and in the dtype that a TransformerConfig gives parameters."""
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    return own_mixer(
        model, layer, kind, group, projections=projections, device=device, dtype=config.params_dtype
    )


def own_module_state(module, prefix: str, sharded_offsets, metadata):
    """Megatron's sharded state dict of a module with a mixer: a checkpoint fits any number of tensor-parallel ranks."""
    state = module.state_dict(keep_vars=True)
    dims = {name: own_dim(name.removeprefix("mixer.")) for name in state}
    sharded = make_sharded_tensors_for_checkpoint(
        state,
        prefix,
        {name: dim for name, dim in dims.items() if dim is not None},
        sharded_offsets,
        tp_group=module.groups.tp,
        dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
    )
    name = f"{prefix}mixer.conv.weight"
    if name in sharded:  # the parts of each stream belong together, not those of each rank
        sharded[name] = _split_tensor_factory(sharded[name], streams(module.mixer), ["query", "key", "value"], 0)
    return sharded
