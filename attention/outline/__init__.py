"""Attention on tensors without data: what each kind keeps for the backward pass and holds meanwhile, and no arithmetic.

A model that gets an `Outline` as its `seq` runs every line of its own on tensors of torch's meta device, while
attention allocates what its kernels would and notes the call. So memory and work of a model are counted on the model
itself, for lengths and GPUs that are not there. Recomputation is that of longspan.attention.recompute: what a layer
keeps for it is kept here as well.
"""

from longspan.attention.outline.context import Outline
from longspan.attention.outline.offload import OutlinedOffload
from longspan.attention.outline.stand_in import Call

__all__ = ["Call", "Outline", "OutlinedOffload"]
