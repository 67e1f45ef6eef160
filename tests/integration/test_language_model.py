"""`python -m experiments.language_model` as a user runs it."""

import json
import math

import numpy as np
from integration.several import several

from experiments.exported import Exported, continued

SMALL = [
    "--units=16", "--embedding_dim=8", "--lanes=4", "--window=10", "--epochs=2",
    "--dynamic_rate=0.3", "--steps_per_execution=2",
]  # fmt: skip


def write_texts(folder):
    """A small grammar: each thing has its colour, another one in the test text."""
    rng = np.random.default_rng(0)
    things, colours = ["sky", "sea", "sun"], ["blue", "green", "red"]
    files = []
    for name, sentences in (("train", 300), ("valid", 60), ("test", 200)):
        of = dict(zip(things, colours[::-1] if name == "test" else colours, strict=True))
        drawn = rng.choice(things, sentences)
        text = "\n".join(f"The {thing} is {of[thing]}." for thing in drawn) + "\n"
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        files.append(f"--{name}={folder}/{name}.txt")
    return files


def test_models_of_characters_and_words_are_trained_and_tested(tmp_path):
    files = write_texts(tmp_path)
    word = ["--unit=word", "--cell=gru", "--layers=2", "--tied", "--embedding_dim=16"]
    runs = [
        [*SMALL, *files, f"--run_dir={tmp_path}/char", f"--export_dir={tmp_path}/exported"],
        [*SMALL, *files, *word, f"--run_dir={tmp_path}/word"],
    ]
    for status, printed, errors in several("experiments.language_model", runs, cwd=tmp_path):
        assert status == 0, errors
        assert "test" in printed and ">>>" in printed
    char, word = (
        json.loads((tmp_path / unit / "results.json").read_text("utf-8"))
        for unit in ("char", "word")
    )
    assert char["test_bits_per_character"] == char["test_loss"] / math.log(2)
    assert word["test_perplexity"] == math.exp(word["test_loss"])
    for results in (char, word):
        assert len(results["epochs"]) == 2 and len(results["samples"]) == 3
        assert results["test_loss_dynamic"] != results["test_loss"]
        assert results["epochs"][1]["valid_loss"] < results["epochs"][0]["valid_loss"]
    assert word["tokens"]["train"] == 300 * 5 and word["vocabulary"] == 2 + 9
    for unit in ("char", "word"):
        for figure in ("learning_curve", "surprise"):
            assert (tmp_path / unit / f"{figure}.png").stat().st_size > 5_000
    model = Exported(tmp_path / "exported")
    assert str(model.version) == char["export_path"] and word["export_path"] is None
    written = continued(model, "The sky", steps=20, temperature=0.8, seed=0)
    assert len(written) == 20 and set(written) <= set("The sky sea sun is blue green red.\n")
    assert written == continued(model, "The sky", steps=20, temperature=0.8, seed=0)
    again = [[*runs[0], "--resume"]]
    ((status, printed, errors),) = several("experiments.language_model", again, cwd=tmp_path)
    assert status == 0 and "complete" in printed, errors


def test_what_cannot_be_done_is_said_in_one_sentence(tmp_path):
    train, _, test = write_texts(tmp_path)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    errors = [
        ([train, test], "--valid is missing"),
        ([train, test, f"--valid={tmp_path}/none.txt"], "--valid"),
        ([train, test, f"--valid={tmp_path}/bytes.txt"], "must be readable UTF-8"),
        (["--data=tiny_shakespeare", f"--data_dir={tmp_path}/none"], "--data generated"),
        (["--data=generated", "--tied", "--units=9"], "--units"),
        (["--data=generated", "--backprop_windows=all"], "--backprop_windows"),
        (["--data=generated", "--temperature=0"], "--temperature"),
    ]
    before = sorted(tmp_path.rglob("*"))
    runs = [[*SMALL, *flags] for flags, _ in errors]
    results = several("experiments.language_model", runs, cwd=tmp_path)
    for (flags, message), (status, _, printed) in zip(errors, results, strict=True):
        assert status != 0, flags
        assert message in printed and "Traceback" not in printed, (flags, printed)
    assert sorted(tmp_path.rglob("*")) == before
