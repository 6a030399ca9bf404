"""The ranks of a benchmark run: contexts for strategies and layouts, times and errors that all ranks agree on."""

import gc
import os
import statistics
import time
import traceback

import torch
import torch.distributed as dist

from longspan.benchmarks.worker import describe
from longspan.kernels.peer import peer_kernels
from longspan.launcher.clock import Clock
from longspan.models.config import ModelConfig
from longspan.models.decay import ScalarGate
from longspan.models.decoder import Decoder
from longspan.models.rope import rotary_angles
from longspan.parallel import SequenceParallel
from longspan.parallel.mesh import Mesh, build_mesh
from longspan.parallel.peer_memory import open_peer_memory

DIRECTIONS = ("forward", "forward+backward")
NCCL = "_nccl"
SLOW_S = 1.0  # what takes longer is repeated twice


def join(device: str, timeout_s: float = 120.0, key_blocks: int = 0) -> Mesh:
    """The mesh of one SP group over all ranks; on "cuda" every rank takes the GPU of its local rank."""
    found = torch.device(device)
    if found.type == "cuda":
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(found)
    return build_mesh(sp=0, sharding="fsdp", device=found, timeout_s=timeout_s, key_blocks=key_blocks)


def layer_step(kind: str, heads: int, kv_heads: int, head_dim: int, seq, dtype, device, **settings):
    """A step, as `Ranks.measure` takes it, of a whole decoder layer on this rank's tokens of `seq`, its gradients
    included; without gradient reduction over ranks. settings: others of the model."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=256, num_layers=1, hidden_size=heads * head_dim, num_heads=heads, num_kv_heads=kv_heads,
        pattern=[kind], **settings,
    )  # fmt: skip
    block = Decoder(config).blocks[0].to(device, dtype)
    for module in block.modules():
        if isinstance(module, ScalarGate):
            module.float()
    x = torch.randn(seq.num_tokens_local, config.hidden_size, dtype=dtype, device=device, requires_grad=True)
    d_out, leaves = torch.randn_like(x), [x, *block.parameters()]
    angles = rotary_angles(seq.positions, config.head_size, **config.rope, dtype=torch.float32)

    def step(mark):
        mark()
        out = block(x, angles, seq)
        mark()
        torch.autograd.grad(out, leaves, d_out)
        mark()

    return step


class Ranks:
    """mesh: longspan.parallel.mesh.Mesh with one SP group over all ranks; repetitions: timed runs of one case. peers:
    its PeerMemory, or None where GPUs share none. starting_s: seconds of first calls, which compile."""

    def __init__(self, mesh, device: torch.device, repetitions: int):
        self.mesh, self.device, self.repetitions, self.starting_s = mesh, device, repetitions, 0.0
        self.peers = open_peer_memory(mesh.sp_state_group, mesh.sp_topology, device, peer_kernels)

    def context(self, lengths, layout: str, strategy: str = "auto"):
        """strategy: of linear attention, as in parallel.linear; with NCCL behind it, not through shared memory."""
        groups, peers = (self.mesh.sp_group, self.mesh.sp_state_group), self.peers
        if strategy.endswith(NCCL):
            strategy, peers = strategy.removesuffix(NCCL), None
        options = {"layout": layout, "linear": strategy, "device": self.device}
        return SequenceParallel(*groups, peers=peers, **options).context(lengths)

    def alone(self, lengths):
        """The context of this rank as if it were the only one."""
        return SequenceParallel(device=self.device).context(lengths)

    def received(self) -> int:
        """Bytes that came through shared memory so far."""
        return 0 if self.peers is None else self.peers.received

    def measure(self, step) -> dict[str, float]:
        """Median milliseconds by direction; of each repetition the slowest rank counts. step(mark) marks the start,
        the end of the forward and the end of the backward."""
        hosts, begin = [], 0.0
        for _ in range(3):
            begin = time.perf_counter()
            step(lambda: None)
            hosts.append(time.perf_counter() - begin)
            self._synchronize()
            if len(hosts) == 1:
                self.starting_s += time.perf_counter() - begin
            if len(hosts) == 2 and self._slowest(time.perf_counter() - begin) > SLOW_S:
                break
        repetitions = self.repetitions if len(hosts) == 3 else min(2, self.repetitions)
        found = [self._repetition(step, min(hosts)) for _ in range(repetitions)]
        medians = [statistics.median(column) for column in torch.tensor(self._slowest(found)).t().tolist()]
        return dict(zip(DIRECTIONS, medians, strict=True))

    def mean(self, found: dict[str, float]) -> dict[str, float]:
        """Means over the ranks of numbers that all have."""
        total = torch.tensor([*found.values()], dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.mesh.sp_group)
        return dict(zip(found, (total / self.mesh.sp).tolist(), strict=True))

    def _slowest(self, seconds):
        """The highest of all ranks, number by number."""
        highest = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(highest, dist.ReduceOp.MAX, self.mesh.sp_group)
        return highest.tolist()

    def _repetition(self, step, host_s: float) -> list[float]:
        """Milliseconds of the forward and of both. On a GPU the ranks first meet on the host, then on the device, and
        the device idles for as long as the host needs to queue the work: what is timed is the device's part."""
        clock, marks = Clock(self.device), []
        dist.barrier(self.mesh.sp_group)
        if self.device.type == "cuda":
            torch.cuda._sleep(int(1.5 * host_s * 1.8e9) + 1_000_000)
            dist.all_reduce(torch.ones(1, device=self.device), group=self.mesh.sp_group)
        step(lambda: marks.append(clock.mark()))
        begin, *ends = marks
        assert len(ends) == 2, len(ends)
        return [1e3 * clock.seconds(begin, end) for end in ends]

    def _synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def within(self, start: float, budget_s: float, function, *arguments) -> tuple[dict | None, str | None]:
        """As `guarded`; an error as well where rank 0 finds that more than the budget has passed since `start`, without
        first calls: what compiles in one case leaves no less for the others."""
        late = [time.monotonic() - start - self.starting_s > budget_s]
        dist.broadcast_object_list(late)
        if late[0]:
            return None, f"skipped: --budget of {budget_s:.0f} s is spent"
        return self.guarded(function, *arguments)

    def guarded(self, function, *arguments) -> tuple[dict | None, str | None]:
        """(function(self, *arguments), None) or (None, error text); an error on one rank is one on every rank."""
        result = error = None
        try:
            result = function(self, *arguments)
        except Exception as problem:
            traceback.print_exc()
            error = describe(problem)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        errors = [None] * self.mesh.world_size
        dist.all_gather_object(errors, error)
        errors = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None]
        return (None, errors[0]) if errors else (result, None)
