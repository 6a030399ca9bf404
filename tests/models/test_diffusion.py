"""The diffusion transformer against its definition, on one rank and on several."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from cases import layouts
from decoder_oracle import reference_velocity
from spawn import run_ranks

from longspan.models.build import build_model
from longspan.models.config import ModelConfig
from longspan.models.diffusion import sample
from longspan.parallel import SequenceParallel

TINY = dict(
    task="images", hidden_size=16, num_heads=2, mlp_size=20, init_std=0.3, rope_base=10.0, sla_keep=2,
    sla_query_block=8, sla_key_block=4, llsa_block=4, llsa_keep=2, norm_eps=1e-3,
)  # fmt: skip
MODELS = {
    "softmax": dict(pattern=["softmax"], num_layers=2, num_kv_heads=1, qk_norm=True, rope_scaling=2.0),
    "sla": dict(pattern=["sla"], num_layers=2, num_kv_heads=1),
    "llsa": dict(pattern=["llsa"], num_layers=2),
    "linear": dict(pattern=["linear:none", "softmax"], num_layers=2, linear_normalize=True),
}
LENGTHS = (64, 16, 1, 16, 37)  # square images, and what is none


def make_model(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = build_model(ModelConfig(**TINY | MODELS[name]))
    for name, parameter in model.named_parameters():
        if ".linear_" in name or "modulation" in name or name.startswith("head"):  # start at zero
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def make_batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    image, noise = torch.randn(2, sum(LENGTHS), 3, generator=generator, dtype=torch.float64)
    times = torch.rand(len(LENGTHS), generator=generator, dtype=torch.float64)
    return image.to(dtype), noise.to(dtype), times.to(dtype)


def loss_and_gradients(model, batch, seq):
    loss = model(*batch, seq)
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_velocity_and_loss_equal_the_definition(name):
    model, (image, noise, times) = make_model(name), make_batch()
    seq = SequenceParallel().context(LENGTHS)
    at = times.repeat_interleave(torch.tensor(LENGTHS))[:, None]
    noisy = (1 - at) * image + at * noise
    wanted = reference_velocity(model, noisy, times, LENGTHS)
    torch.testing.assert_close(model.velocity(noisy, times, seq), wanted, rtol=1e-10, atol=1e-10)
    loss = sum(((wanted[t] - (noise[t] - image[t])) ** 2).sum() / 3 for t in range(len(image)))
    torch.testing.assert_close(model(image, noise, times, seq), loss, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_a_pixel_sees_its_whole_image_and_no_other(name):
    """With sparse layers where what is chosen covers the image: the second has as many blocks as are chosen at most."""
    model, (image, _, times) = make_model(name), make_batch()
    seq, last = SequenceParallel().context(LENGTHS), LENGTHS[0] + LENGTHS[1] - 1
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(model.velocity(image, times, seq)[LENGTHS[0]].sum(), image)
    seen = gradient.abs().sum(1) > 0
    assert not seen[: LENGTHS[0]].any() and not seen[last + 1 :].any()
    assert seen[LENGTHS[0]] and seen[last]


def test_starts_with_no_velocity_and_every_parameter_in_reach():
    model, batch = build_model(ModelConfig(**TINY | MODELS["sla"])), make_batch(torch.float32)
    seq = SequenceParallel().context(LENGTHS)
    assert not model.velocity(batch[0], batch[2], seq).any()
    assert model(*batch, seq).item() == pytest.approx(((batch[1] - batch[0]) ** 2).sum().item() / 3, rel=1e-5)
    gradients = loss_and_gradients(model, batch, seq)
    assert gradients["head.weight"].any()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Towards(torch.nn.Module):
    """The exact velocity where every image is `target`: (x_t - target) / t."""

    def __init__(self, target):
        super().__init__()
        self.target, self.times = target, []

    def velocity(self, noisy, times, seq):
        self.times.append(times.tolist())
        return (noisy - self.target) / times[0]


def test_sampling_follows_straight_paths_exactly():
    image, noise, _ = make_batch()
    model, seq = Towards(image), SequenceParallel().context(LENGTHS)
    torch.testing.assert_close(sample(model, noise, seq, steps=5), image)
    assert model.times == [[step / 5] * len(LENGTHS) for step in (5, 4, 3, 2, 1)]


CASES = [(name, layout) for name in MODELS for layout in ("balanced", "contiguous")] + [("sla", "holes")]


@cache
def one_rank(name):
    return loss_and_gradients(make_model(name), make_batch(), SequenceParallel().context(LENGTHS))


def run_all(rank, world_size):
    """This rank's part of the loss and the gradients of every case."""
    results = []
    for name, layout_name in CASES:
        layout = layouts(LENGTHS, world_size)[layout_name]
        held = torch.from_numpy(layout.global_indices(rank))
        image, noise, times = make_batch()
        seq = SequenceParallel(dist.group.WORLD).context(layout)
        results.append(loss_and_gradients(make_model(name), (image[held], noise[held], times), seq))
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_one_rank(world_size):
    for case, *shares in zip(CASES, *run_ranks(run_all, world_size), strict=True):
        for name, wanted in one_rank(case[0]).items():
            found = sum(share[name] for share in shares)
            assert (found - wanted).norm() <= 1e-9 * wanted.norm(), (case, name)
