import keras
import pytest

from experiments import influence


@pytest.mark.parametrize(
    ("window", "expected"),
    [(1, 1.0), (10, 10.0), (20, 16.5), (30, 9.9), (40, 0.57), (50, -4.75), (100, -6.0)],
)
def test_the_sensitivity_over_a_window(window, expected):
    digits = 2 if window in (40, 50) else 1
    assert round(influence.sensitivity(window), digits) == expected


def test_artbp_is_right_in_the_mean_where_a_window_of_its_length_has_the_wrong_sign():
    mean, error = influence.draw_artbp(draws=300, seed=0, cut_probability=0.1)
    assert abs(mean + 6) < 3 * error and error < 0.9


def test_a_window_of_one_step_moves_theta_the_wrong_way():
    model = influence.build_model(window=1)
    model.compile(keras.optimizers.SGD(0.1), "mse", loss_weights=0.5)
    model.fit(influence.read_documents(steps=1, window=1), verbose=0)
    assert float(model.trainable_variables[0]) == pytest.approx(0.1)  # rate (1 - s0) times 1
