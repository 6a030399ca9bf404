"""Generated images, their noise and their times: the same on any split of ranks, and distributed as they should be."""

import numpy as np
import pytest
import torch

from longspan.launcher.errors import UserError
from longspan.launcher.images import ImageBuilder, time_of
from longspan.launcher.random_bits import normal, uniform
from longspan.launcher.scenes import scene
from longspan.models.morton import coordinates
from longspan.parallel import SequenceParallel

SIZE, SEQ_LEN = 8, 4 * 64


def make_builder(rank=0, world_size=1, layout="auto", size=SIZE, seed=1, split="train", **changes):
    """Of one rank of an SP group; building batches communicates nothing, so no process group is needed."""
    parallel = SequenceParallel(layout=layout)
    parallel.rank, parallel.world_size = rank, world_size
    placement = dict(dp=1, dp_rank=0, samples=4, device="cpu") | changes
    return ImageBuilder(parallel, size, SEQ_LEN, seed, split, **placement)


def gathered(batches):
    """[images, pixels, 3] of image and noise, and the times, of one micro-batch from all ranks of an SP group."""
    layout = batches[0].seq.layout
    parts = torch.full((2, layout.num_tokens, 3), torch.nan)
    for rank, batch in enumerate(batches):
        assert torch.equal(batch.times, batches[0].times)
        assert batch.image.dtype == batch.noise.dtype == batch.times.dtype == torch.float32
        parts[:, torch.from_numpy(layout.global_indices(rank))] = torch.stack([batch.image, batch.noise])
    return [*parts.unflatten(1, (len(layout.lengths), -1)).tolist(), batches[0].times.tolist()]


@pytest.mark.parametrize("layout", ["auto", "zigzag"])
@pytest.mark.parametrize(("dp", "sp"), [(2, 1), (1, 3), (2, 2), (4, 8)])
def test_every_split_of_ranks_sees_the_same_images(layout, dp, sp):
    for position in (0, 4):
        whole = sorted(gathered([batch]) for batch in make_builder().build(position))
        seen = []
        for dp_rank in range(dp):
            ranks = [make_builder(rank, sp, layout, dp=dp, dp_rank=dp_rank).build(position) for rank in range(sp)]
            for micro_batch in zip(*ranks, strict=True):
                assert {batch.num_labels_global for batch in micro_batch} == {4 * SEQ_LEN}
                seen.append(gathered(micro_batch))
        assert sorted(seen) == whole


def test_pixels_are_those_of_the_scene_in_morton_order():
    (batch, *_) = make_builder().build(2)
    rows, columns = np.divmod(np.arange(SIZE * SIZE), SIZE)
    for place in range(4):
        plane = scene(rows, columns, SIZE, 1, 0, 0, 2 * 4 + place).reshape(SIZE, SIZE, 3)
        tokens = batch.image[place * 64 :][:64].numpy()
        np.testing.assert_array_equal(tokens, plane[coordinates(np.arange(64))])


def test_no_image_no_noise_and_no_time_comes_twice():
    kinds = [dict(seed=1), dict(seed=2), dict(seed=1, split="validation")]
    batches = [batch for kind in kinds for position in (0, 4) for batch in make_builder(**kind).build(position)]
    for tensors in ([x.image for x in batches], [x.noise for x in batches], [x.times[:, None] for x in batches]):
        rows = torch.cat([x.unflatten(0, (4, -1)).flatten(1) for x in tensors])
        assert len(rows.unique(dim=0)) == len(rows) == 3 * 8 * 4


def test_a_scene_is_the_same_in_every_size():
    """But for soft edges, a quarter of the pixels are the means of four."""
    scenes = [scene(*np.divmod(np.arange(n * n), n), n, 5).reshape(16, n // 16, 16, n // 16, 3) for n in (64, 128)]
    small, large = (x.mean((1, 3)) for x in scenes)
    assert np.abs(small - large).mean() < 0.004 < 0.1 < np.abs(small - small[::-1]).mean()
    assert -1 <= small.min() < -0.3 and 0.3 < small.max() <= 1


def test_random_numbers_by_place():
    np.testing.assert_array_equal(normal(10, 3, 1)[4:], normal(6, 3, 1, first=4))
    assert not np.isin(normal(10, 3, 1), normal(10, 3, 2)).any()
    assert uniform((1, 4), 3, 1)[0].tolist() == pytest.approx(PINNED, abs=1e-12)  # an earlier run can be resumed


PINNED = [0.8572859273383533, 0.9018187745966977, 0.9275903372496752, 0.6910312447882303]


def test_noise_is_standard_normal():
    x = normal(50_000, 7)
    assert x.mean(0) == pytest.approx([0] * 4, abs=0.02) and np.cov(x.T) == pytest.approx(np.eye(4), abs=0.02)
    for bound, share in ((-2, 0.02275), (-1, 0.15866), (0.5, 0.69146)):
        assert (x < bound).mean(0) == pytest.approx([share] * 4, abs=0.008)
    assert (x**4).mean(0) == pytest.approx([3] * 4, abs=0.15)


def test_times_are_logit_normal():
    times = np.array([time_of(1, 0, number) for number in range(4000)])
    logit = np.log(times / (1 - times))
    assert logit.mean() == pytest.approx(0, abs=0.06) and logit.std() == pytest.approx(1, abs=0.05)


def test_samples_must_be_dealt_evenly():
    with pytest.raises(UserError, match="6 samples cannot be dealt evenly to 4 .*train.global_batch"):
        make_builder(samples=6, dp=4)
