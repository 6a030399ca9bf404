"""Morton order against a descent through quarters, and the patches that runs of it are."""

import numpy as np
import pytest
from decoder_oracle import pixel

from longspan.models.morton import coordinates


def test_equals_the_descent_through_quarters():
    places = np.array([*range(300), 12345, 65535, 2**40 + 77])
    assert list(zip(*coordinates(places))) == [pixel(int(place)) for place in places]


@pytest.mark.parametrize("run, height, width", [(4, 2, 2), (8, 2, 4), (16, 4, 4), (64, 8, 8), (128, 8, 16)])
def test_runs_are_patches(run, height, width):
    """Of 32 x 32 pixels, each once: a run is as wide as it is high, or twice as wide."""
    rows, columns = (x.reshape(-1, run) for x in coordinates(np.arange(32 * 32)))
    assert len({*zip(rows.flat, columns.flat)}) == 32 * 32 and rows.max() == columns.max() == 31
    assert (np.ptp(rows, 1) == height - 1).all() and (np.ptp(columns, 1) == width - 1).all()
