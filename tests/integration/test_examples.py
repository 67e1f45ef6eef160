import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


def run(name):
    """Runs an example as a user does, and returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "UserWarning" not in process.stderr, process.stderr
    return process.stdout


def last_number(line):
    return float(re.findall(r"[0-9.]*[0-9]", line)[-1])


def test_by_hand_learns_the_weights_of_the_library():
    assert run("by_hand").endswith("the same weights as TBPTTModel to 1e-6.\n")


def test_existing_keras_code_learns_from_the_first_window():
    assert last_number(run("existing_keras_code").splitlines()[-1]) > 0.9


def test_sentiment_of_new_texts():
    accuracy, positive, negative = run("sentiment").splitlines()[-3:]
    assert last_number(accuracy) > 0.9
    assert float(positive.split()[0]) > 0.9
    assert float(negative.split()[0]) < 0.1


def test_a_character_model_adapts_and_writes():
    test, dynamic, *texts = run("character_model").splitlines()[-4:]
    assert last_number(dynamic) < last_number(test) < 2.6
    assert all(len(text) > 80 for text in texts)


def test_every_word_gets_its_tag():
    accuracy, *words = run("tagging").splitlines()[-7:]
    assert last_number(accuracy) > 0.99
    assert words[1:4] == ["watch    noun", "watch    verb", "a        determiner"]


def test_a_series_is_forecast_better_than_by_persistence_and_streamed():
    errors, values = run("time_series").splitlines()[-2:]
    error, persistence = map(float, re.findall(r"[0-9]+\.[0-9]+", errors))
    assert error < 0.2 * persistence
    stream, whole = map(float, re.findall(r"[0-9]+\.[0-9]+", values))
    assert stream == pytest.approx(whole, abs=2e-3)


def test_a_text_in_pieces_is_served_like_the_whole_text():
    *pieces, whole = run("serve_and_stream").splitlines()
    assert len(pieces) == 4
    assert float(pieces[-1].split()[0]) == pytest.approx(float(whole.split()[0]), abs=2e-4)
    assert float(whole.split()[0]) > 0.9


def test_every_example_is_short_and_has_a_test():
    tests = pathlib.Path(__file__).read_text(encoding="utf-8")
    for path in (ROOT / "examples").glob("*.py"):
        assert f'run("{path.stem}")' in tests, path
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 80, path
