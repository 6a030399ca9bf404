"""What gradients of keys that are part of states of linear attention (kernels.block_states) come from."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KeyStates:
    """states: fp32 [n, Hkv, 1, D * D + D], gradients of sums of phi(k) v^T and of phi(k). rows: int32, for every key
    block of a plan the state that its keys are in. feature_map: softmax or elu1."""

    states: torch.Tensor
    rows: torch.Tensor
    feature_map: str
