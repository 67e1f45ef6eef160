"""The style of figures: colours for all window losses, and names that never overlap."""

import itertools

import numpy as np
import pytest

from experiments import figures
from keras_tbptt.losses import WINDOW_LOSSES


@pytest.mark.parametrize("seed", range(20))
def test_no_arrangement_with_enough_room_is_closer_to_the_heights(seed):
    rng = np.random.default_rng(seed)
    heights = rng.integers(0, 8, rng.integers(1, 5)).astype(float)
    places = figures.spread(heights, room=2.0)
    order = np.argsort(heights, kind="stable")
    assert np.all(np.diff(places[order]) >= 2.0 - 1e-9)
    distance = np.sum((places - heights) ** 2)
    others = np.array(list(itertools.product(range(-6, 14), repeat=len(heights))))
    others = others[np.all(np.diff(np.sort(others)) >= 2.0, axis=1)]
    assert len(others) and distance <= np.sum((others - heights) ** 2, axis=1).min() + 1e-9


def test_heights_that_are_far_apart_stay():
    heights = np.array([30.0, -5.0, 12.0])
    np.testing.assert_array_equal(figures.spread(heights, room=10.0), heights)


def test_the_names_of_lines_that_end_together_do_not_overlap(tmp_path):
    with figures.figure(tmp_path / "lines.png", columns=2, height=2.0) as (axes, _):
        ends = [(1, y, f"line {y}", figures.INK) for y in (0.5, 0.51, 0.49, 0.9, 0.52)]
        for x, y, _, colour in ends:
            axes.plot([0, x], [0, y], color=colour)
        figures.label_ends(axes, ends)
        axes.figure.draw_without_rendering()
        boxes = [name.get_window_extent() for name in axes.texts]
        assert len(boxes) == 5
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert (tmp_path / "lines.png").exists()


def test_each_window_loss_has_one_colour():
    assert set(figures.COLOURS) == set(WINDOW_LOSSES)
    for loss in WINDOW_LOSSES:
        assert figures.colour_of(loss) == figures.colour_of(f"{loss}, reach 2")
    exact = ("full BPTT", "final_only, reach all", "final_only, reach 2 (all)")
    assert {figures.colour_of(setting) for setting in exact} == {figures.EXACT}
    assert len({*figures.COLOURS.values(), figures.EXACT}) == len(WINDOW_LOSSES) + 1
