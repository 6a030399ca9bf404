"""A training step never makes the host wait for the GPU, and what a layer launches can be captured in a CUDA graph.
(Sparse layers over ranks wait, once or twice, for what was chosen.)"""

import pytest
import torch

from longspan.launcher.stored_models import cast
from longspan.models.build import build_model
from longspan.models.config import LAYER_KINDS, SPARSE_KINDS, ModelConfig
from longspan.models.parallelize import freeze
from longspan.models.rope import rotary_angles
from longspan.models.trainable import Trainable
from longspan.parallel import SequenceParallel


def in_bf16(config):
    """A model on the GPU, all but its gates in bf16."""
    return cast(build_model(config), torch.bfloat16).cuda()


def check_a_step(model, parallel):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    tokens = torch.randint(model.config.vocab_size, (512,), device="cuda")

    def step(seq):
        loss = model(tokens, tokens, seq) / len(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
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


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [kind for kind in LAYER_KINDS if kind not in SPARSE_KINDS])
@pytest.mark.parametrize("tile", [0, 128], ids=["whole", "tiled"])
def test_a_step_waits_for_nothing(kind, tile):
    window = 256 if kind == "softmax:window" else 0
    config = ModelConfig(num_layers=2, hidden_size=128, num_heads=2, pattern=[kind], window=window, qk_norm=True)
    model = in_bf16(config)
    for block in model.blocks:
        block.mlp_tile = tile
    check_a_step(model, SequenceParallel(device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("train", [["blocks.[1-3].mixer"], ["*norm"]], ids=str)
def test_a_step_of_some_parameters_and_groups_of_heads_waits_for_nothing(train):
    pattern = ["linear:scalar", "softmax", "linear:gated_delta", "softmax"]
    model = in_bf16(ModelConfig(num_layers=4, hidden_size=256, num_heads=4, pattern=pattern, qk_norm=True))
    freeze(model, Trainable(tuple(train)))
    check_a_step(model, SequenceParallel(device="cuda", head_groups=2))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["softmax", "linear:scalar", "linear:gated_delta", "sla", "llsa"])
def test_a_layer_is_captured(kind):
    """Forward and backward, replayed with other inputs."""
    config = ModelConfig(num_layers=1, hidden_size=256, num_heads=2, pattern=[kind], qk_norm=True)
    model = in_bf16(config)
    seq = SequenceParallel(device="cuda").context([300, 724])
    rotary = rotary_angles(seq.positions, 128, base=1e4, scaling=1.0, dtype=torch.float32)
    x = torch.randn(1024, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = [x, *model.blocks[0].parameters()]

    def step():
        out = model.blocks[0](x, rotary, seq)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    side = torch.cuda.Stream()  # kernels are compiled, as torch's notes on graphs want it
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for mine, direct in zip(found, step(), strict=True):
        torch.testing.assert_close(mine, direct, rtol=0.02, atol=0.02 * direct.abs().max().item())
