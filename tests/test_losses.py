import numpy as np
import pytest
import tensorflow as tf

from keras_tbptt.losses import WINDOW_LOSSES, window_weights

# Four lanes at window 10: a full window, a tail of 3 steps, a document of 3 steps, an idle lane.
FLAGS = {
    "ends": tf.constant([False, True, True, False]),
    "lengths": tf.constant([10, 3, 3, 0]),
    "positions": tf.constant([10, 30, 0, 0]),
    "totals": tf.constant([40, 33, 3, 0]),
}


def test_a_tail_counts_its_steps_and_a_short_document_counts_whole():
    weights = window_weights("per_window", FLAGS, 10)
    np.testing.assert_allclose(weights, [1, 0.3, 1, 0], rtol=1e-6)


def test_linear_gain_rises_to_one_with_what_has_been_read():
    weights = window_weights("linear_gain", FLAGS, 10)
    np.testing.assert_allclose(weights, [20 / 40, 0.3, 1, 0], rtol=1e-6)
    weights = window_weights("linear_gain", FLAGS, 10, per_step=True)
    np.testing.assert_allclose(weights[0], np.arange(11, 21) / 40, rtol=1e-6)
    np.testing.assert_allclose(weights[1, :4], [31 / 33, 32 / 33, 1, 0], rtol=1e-6)


def test_no_window_counts_more_than_a_full_last_one():
    last = {**FLAGS, "positions": tf.constant([30, 30, 0, 0]), "ends": tf.constant([True] * 4)}
    for window_loss in WINDOW_LOSSES:
        assert max(window_weights(window_loss, FLAGS, 10)) <= 1
        assert window_weights(window_loss, last, 10)[0] == 1


@pytest.mark.parametrize("name", ["final_only", "pooled"])
def test_final_only_counts_the_window_that_ends_a_document(name):
    np.testing.assert_array_equal(window_weights(name, FLAGS, 10), [0, 1, 1, 0])


def test_with_targets_a_step_every_real_step_counts_one():
    weights = window_weights("per_window", FLAGS, 10, per_step=True)
    np.testing.assert_array_equal(weights.numpy().sum(axis=1), [10, 3, 3, 0])
    weights = window_weights("final_only", FLAGS, 10, per_step=True)
    np.testing.assert_array_equal(weights.numpy().sum(axis=1), [0, 3, 3, 0])


def test_an_unknown_window_loss_is_named():
    with pytest.raises(ValueError, match=r"must be one of .* Received: window_loss='sometimes'"):
        window_weights("sometimes", FLAGS, 10)
