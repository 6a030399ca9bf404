"""A training step never makes the host wait for the GPU. (Sparse layers do, once or twice, for what was chosen.)"""

import pytest
import torch

from longspan.models.build import build_model
from longspan.models.config import LAYER_KINDS, SPARSE_KINDS, ModelConfig
from longspan.models.decay import Gate
from longspan.parallel import SequenceParallel


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [kind for kind in LAYER_KINDS if kind not in SPARSE_KINDS])
@pytest.mark.parametrize("tile", [0, 128], ids=["whole", "tiled"])
def test_a_step_waits_for_nothing(kind, tile):
    window = 256 if kind == "softmax:window" else 0
    config = ModelConfig(num_layers=2, hidden_size=128, num_heads=2, pattern=[kind], window=window, qk_norm=True)
    with torch.device("cuda"):
        model = build_model(config)
    for module in model.modules():
        if not isinstance(module, Gate):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()
    for block in model.blocks:
        block.mlp_tile = tile
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    parallel = SequenceParallel(device="cuda")
    tokens = torch.randint(config.vocab_size, (512,), device="cuda")

    def step(seq):
        loss = model(tokens, tokens, seq) / len(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step(parallel.context([300, 212]))  # kernels are compiled, and what layers derive from lengths is known
    seq = parallel.context([200, 312])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step(seq)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
