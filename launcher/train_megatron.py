"""Example: a small GPTModel of megatron-core whose layers are longspan's, trained on a corpus in Megatron's format.

`torchrun --nproc-per-node 4 launcher/train_megatron.py --data data/stdlib --tp 2 --cp 2`; docs/megatron.md says more.
Losses depend on neither the number of ranks nor how they are used.
"""

import os
import sys
import warnings
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from longspan.launcher.agreement import agree_on
from longspan.launcher.arguments import Parser, num_tokens, option
from longspan.launcher.batches import NO_LABEL, BatchLoader, TextBuilder
from longspan.launcher.config import CorpusConfig, DataConfig
from longspan.launcher.corpus import open_corpus
from longspan.launcher.environment import choose_device
from longspan.launcher.errors import UserError, main_guard
from longspan.launcher.facts import sizes, versions
from longspan.launcher.samples import SampleStream
from longspan.parallel import SequenceParallel
from longspan.parallel.mesh import group_topology, ranks_here

VOCABULARY_MULTIPLE = 128  # embeddings are cut by vocabulary for tensor-parallel ranks


def main(argv: list[str]) -> list[float]:
    """Trains as the arguments say; the losses of the steps."""
    options, losses = parse(argv), []
    device = choose_device("auto")
    state = join(options, on_gpu=device.type == "cuda")
    agree_on({name: str(value) for name, value in vars(options).items()} | versions() | sizes([options.data]))
    corpus = open_corpus(options.data)
    vocabulary = -(-(corpus.vocab_size or options.vocab_size) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    loader = batches(options, corpus, vocabulary, state, device)
    with warnings.catch_warnings():  # of optional packages that are not there
        warnings.simplefilter("ignore")
        model = build(options, vocabulary, links(options)).to(device, getattr(torch, options.dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    replicas = state.get_data_parallel_group(with_context_parallel=True)
    for step in range(1, options.steps + 1):
        total = torch.zeros((), device=device)
        for batch in loader.next_step():
            # [1, tokens of this rank]; positions are known to the layers, and masks are causal.
            of_tokens = model(batch.tokens[None], None, None, labels=batch.labels.clamp(min=0)[None])[0]
            loss = of_tokens[batch.labels != NO_LABEL].sum() / batch.num_labels_global
            loss.backward()
            total += loss.detach()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=replicas)
        dist.all_reduce(total, group=replicas)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
        if dist.get_rank() == 0:
            print(f"step {step:4d}  loss {losses[-1]:.5f}", flush=True)
    loader.close()
    return losses


def parse(argv: list[str]) -> SimpleNamespace:
    parser = Parser("train_megatron", __doc__.splitlines()[0])
    for name, options in (
        option("--data", "PREFIX", "corpus PREFIX.bin, PREFIX.idx", required=True),
        option("--pattern", "KIND", "kinds of layers", nargs="+", default=["linear:gated_delta", "softmax"]),
        option("--tp", "N", "ranks that share layers", 1),
        option("--cp", "N", "ranks that share a sequence", 1),
        option("--steps", "N", "of the optimizer", 20),
        option("--global-batch", "N", "samples of a step", 4),
        option("--layers", "N", "of the model", 4),
        option("--hidden-size", "N", "width of the residual stream", 128),
        option("--heads", "N", "of every layer", 4),
        option("--seed", "N", "of weights and the order of samples", 0),
        option("--vocab-size", "N", "where no PREFIX.json says it", 65536),
        option("--seq-len", "TOKENS", "such as 128K (default 1K)", type=num_tokens, default=1024),
        option("--lr", "X", "learning rate", 1e-3),
        option("--dtype", None, "of all weights", "float32", choices=["float32", "bfloat16"]),
        option("--peer-memory", None, "states through memory that GPUs share", "auto", choices=["auto", "on", "off"]),
    ):
        parser.add_argument(name, **options)
    options = SimpleNamespace(**parser.read(argv))
    for name, value in vars(options).items():
        least = 0 if name == "seed" else 1
        if isinstance(value, int) and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: use {least} or more")
    return options


def join(options, on_gpu: bool):
    """megatron-core's parallel_state, initialised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from megatron.core import parallel_state
        except ImportError as error:
            raise UserError(f"train_megatron needs megatron-core ({error}); pip install megatron-core") from error
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("nccl" if on_gpu else "gloo", **alone)
    world_size = dist.get_world_size()
    if world_size % (options.tp * options.cp):
        raise UserError(f"--tp {options.tp} times --cp {options.cp} does not divide the {world_size} ranks of this run")
    parallel_state.destroy_model_parallel()  # of an earlier call
    parallel_state.initialize_model_parallel(options.tp, context_parallel_size=options.cp)
    return parallel_state


def batches(options, corpus, vocabulary: int, state, device) -> BatchLoader:
    """This rank's batches: a sample is one sequence of seq_len tokens, cut as Megatron cuts it, which is zig-zag."""
    if options.seq_len % (2 * options.cp):
        raise UserError(f"--seq-len {options.seq_len} must be a multiple of 2 --cp, {2 * options.cp}")
    data = DataConfig(corpora=[CorpusConfig(path=options.data)], seq_len=options.seq_len, respect_documents=False)
    builder = TextBuilder(
        SampleStream([corpus], data, options.seed),
        SequenceParallel(state.get_context_parallel_group(), layout="zigzag"),
        respect_documents=False,
        vocab_size=vocabulary,
        samples=options.global_batch,
        dp=state.get_data_parallel_world_size(),
        dp_rank=state.get_data_parallel_rank(),
        device=device,
    )
    return BatchLoader(builder, prefetch=2)


def links(options) -> dict:
    """What layers know of the ranks that share a sequence. Collective."""
    topology = group_topology(options.cp, options.tp, ranks_here())
    return {"topology": topology, "peer_memory": options.peer_memory}


def build(options, vocabulary: int, parallel: dict):
    """The model, on the CPU. Its initial weights are the same for any number of ranks. parallel: of block_spec."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    from longspan.models.megatron import block_spec

    torch.manual_seed(options.seed)
    config = TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.heads,
        tensor_model_parallel_size=options.tp,
        context_parallel_size=options.cp,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,  # needs apex
        bias_dropout_fusion=False,
    )
    spec = block_spec(config, options.pattern, rope="longspan", parallel=parallel)
    return GPTModel(config, spec, vocabulary, options.seq_len, position_embedding_type="none")


if __name__ == "__main__":
    with main_guard():
        main(sys.argv[1:])
        dist.destroy_process_group()
