"""Training steps of other systems on the model of plain_decoder.py: torch's own context parallelism, DeepSpeed's
Ulysses, flash-linear-attention on one GPU. A system: System(config, device), then step(tokens, labels) -> mean loss.

tokens, labels: int64 [1, L], the whole sequence, the same on all ranks.
"""

import math
import types
from abc import ABC, abstractmethod
from contextlib import ExitStack, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from longspan.benchmarks.plain_decoder import Attention, PlainDecoder, summed_loss
from longspan.launcher.config import OptimConfig
from longspan.launcher.engines.optimizer import build_optimizer


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def fastest_kernel(device: torch.device):
    """cuDNN's attention, ahead of torch's other kernels on Hopper."""
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device.type == "cuda" else nullcontext()


class TorchFsdp(ABC):
    """FSDP2 in bf16 with gradients summed in fp32, every block computed again in the backward, fused AdamW."""

    settings = "FSDP2, full activation checkpointing, loss in chunks"

    def __init__(self, config, device):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.config, self.device, self.world_size = config, device, dist.get_world_size()
        self.mesh = dist.init_device_mesh(device.type, (self.world_size,))
        torch.manual_seed(0)
        with device:
            self.model = PlainDecoder(config, self.mixer)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        options = {"mesh": self.mesh, "mp_policy": MixedPrecisionPolicy(dtype, torch.float32)}
        for module in (*self.model.blocks, self.model):
            fully_shard(module, **options)
        self.optimizer = build_optimizer(self.model, OptimConfig())

    @abstractmethod
    def mixer(self) -> nn.Module:
        """The attention of a block."""

    @abstractmethod
    def share(self, buffers, stack) -> list[torch.Tensor]:
        """This rank's part of buffers [1, L]; contexts that the step needs are entered on `stack`."""

    def step(self, tokens, labels):
        count = labels.numel()
        with ExitStack() as stack:
            positions = torch.arange(count, device=self.device)[None]
            loss = self.model(*self.share([tokens.clone(), labels.clone(), positions], stack))
            (loss * (self.world_size / count)).backward()  # FSDP takes the mean over ranks
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        return total.item() / count


class TorchContextParallel(TorchFsdp):
    """context_parallel shards the sequence head-tail and makes SDPA a ring. It has no kernels for CPUs: there keys are
    gathered, for tests of all the rest."""

    settings = TorchFsdp.settings + ", context_parallel with cuDNN's SDPA"

    def mixer(self):
        return Attention(self.config, causal if self.device.type == "cuda" else self._gathered)

    def share(self, buffers, stack):
        if self.device.type == "cpu":
            return [x.chunk(self.world_size, 1)[dist.get_rank()] for x in buffers]
        from torch.distributed.tensor.experimental import context_parallel

        stack.enter_context(fastest_kernel(self.device))
        options = {"buffer_seq_dims": [1] * len(buffers), "no_restore_buffers": set(buffers)}
        stack.enter_context(context_parallel(self.mesh, buffers=buffers, **options))
        return buffers

    def _gathered(self, q, k, v):
        k, v = (_Gather.apply(x.contiguous()) for x in (k, v))
        first = dist.get_rank() * q.shape[2]
        row, column = torch.arange(q.shape[2])[:, None] + first, torch.arange(k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=row >= column)


class _Gather(torch.autograd.Function):
    """[1, H, T, K] of every rank, one behind the other."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size(), 2)[dist.get_rank()]


class FlaLinear(TorchFsdp):
    """One GPU, layers of flash-linear-attention with a fixed decay per head and an output gate."""

    settings = TorchFsdp.settings + ", fla.layers.MultiScaleRetention"

    def mixer(self):
        from fla.layers import MultiScaleRetention

        class Mixer(MultiScaleRetention):
            def forward(self, x, cos, sin):
                return super().forward(x)[0]

        config = self.config
        return Mixer(hidden_size=config.hidden_size, num_heads=config.num_heads, expand_v=1.0, norm_eps=config.norm_eps)

    def share(self, buffers, stack):
        return buffers


class DeepSpeedUlysses:
    """Arctic long-sequence training (ALST): Ulysses between ranks, ZeRO-3, MLP and loss in tiles, blocks computed again
    in the backward. Activations stay on the GPU, where these lengths fit; weights are bf16, fp32 in the optimizer."""

    settings = "UlyssesSPAttentionHF over cuDNN's SDPA, ZeRO-3, TiledMLP, TiledFusedLogitsLoss, full checkpointing"

    def __init__(self, config, device):
        from longspan.launcher.engines.zero import import_deepspeed

        deepspeed = import_deepspeed(device)
        from deepspeed.runtime.sequence_parallel import parallel_state_sp, ulysses_sp

        self.config, self.device, self.world_size = config, device, dist.get_world_size()
        self.tiled = ulysses_sp
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
        parallel_state_sp.initialize_sequence_parallel(self.world_size)
        self.ulysses = ulysses_sp.UlyssesSPAttentionHF(
            self._core, 1, config.num_heads, config.head_size, config.kv_heads, config.num_layers,
            parallel_state_sp.get_sequence_parallel_group(), seq_length_is_variable=True,
        )  # fmt: skip
        torch.manual_seed(0)
        with device:
            model = PlainDecoder(config, lambda: Attention(config, self._attend), self._loss)
        for block in model.blocks:
            block.mlp.forward = types.MethodType(self._feed, block.mlp)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": device.type == "cuda"},
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
        }
        options = {"optimizer": build_optimizer(model, OptimConfig()), "mpu": parallel_state_sp}
        self.engine, *_ = deepspeed.initialize(model=model, config=settings, **options)

    @staticmethod
    def _core(module, q, k, v, mask, **options):
        return causal(q, k, v).transpose(1, 2), None

    def _attend(self, q, k, v):
        out, _ = self.ulysses(self.ulysses, q, k, v, None, position_ids=self.positions)
        return out.unflatten(-1, (-1, self.config.head_size)).transpose(1, 2)

    def _feed(self, mlp, x):
        """As many tiles as the hidden size goes into the tokens, as DeepSpeed's documentation has it."""
        weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
        tiles = math.ceil(x.shape[1] / self.config.hidden_size)
        return self.tiled.TiledMLP.apply(lambda mlp, x: type(mlp).forward(mlp, x), mlp, x, tiles, weights)

    def _loss(self, head, x, labels):
        """The mean over this rank's tokens: gradients of the head are made here, whatever multiplies it later."""
        count = labels.numel()
        tiles = math.ceil(count / self.config.loss_chunk)

        def loss(head, x, labels):
            return summed_loss(head, x, labels) / count

        return self.tiled.TiledFusedLogitsLoss.apply(loss, head, x, labels, None, tiles, [head.weight], "sum")

    def step(self, tokens, labels):
        positions = torch.arange(labels.numel(), device=self.device)[None]
        mine = [x.chunk(self.world_size, 1)[dist.get_rank()].contiguous() for x in (tokens, labels, positions)]
        self.positions = mine[2]
        with fastest_kernel(self.device):
            loss = self.engine(*mine)
            self.engine.backward(loss)  # ZeRO takes the mean over ranks
            self.engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total.item() / self.world_size


SYSTEMS = {"torch_cp": TorchContextParallel, "deepspeed_ulysses": DeepSpeedUlysses, "fla": FlaLinear}
