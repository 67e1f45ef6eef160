"""`python -m experiments.stream` from end to end, with the export of a small trained model."""

import json
import os
import pathlib
import pty
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from integration.several import several
from toys import VOCAB, compiled, token_model

import keras_tbptt
from experiments.generated import write_reviews

ROOT = pathlib.Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-m", "experiments.stream"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    texts, labels = write_reviews(60, seed=0)
    vectorizer = keras_tbptt.text.make_vectorizer(texts, VOCAB)
    documents = keras_tbptt.text.encode(vectorizer, texts)
    model = compiled(token_model(), "adam")
    windows = keras_tbptt.DocumentWindows(documents, labels, window=5, lanes=4)
    model.fit(windows, epochs=1, verbose=0)
    path = tmp_path_factory.mktemp("models")
    keras_tbptt.export_saved_model(model, path / "toy", vectorizer, version=9)
    version = keras_tbptt.export_saved_model(model, path / "toy", vectorizer, version=10)
    keras_tbptt.export_saved_model(model, path / "without_text")
    return version, tf.saved_model.load(str(version)).signatures["serving_default"]


def run(text, *flags, cwd=ROOT):
    return subprocess.run(
        [*COMMAND, *map(str, flags)],
        input=text, capture_output=True, check=False, cwd=cwd, env=ENVIRONMENT,
    )  # fmt: skip


def test_at_the_end_the_stream_is_the_whole_document(trained, tmp_path):
    version, serve = trained
    text = " ".join(write_reviews(3, seed=1)[0]).replace(". ", ".<br /><br />").encode()
    text = b"caf\xff costs $5, \xe2 \xf0\x9f\x98\x80 $6 " + text + b" the\xe2"
    done = run(text, f"--model={version.parent}", f"--run_dir={tmp_path}/run", "--window=7")
    assert done.returncode == 0, done.stderr
    whole = serve(text=tf.constant([text]))["probability"].numpy().item()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["final_probability"] == pytest.approx(whole, abs=1e-5)
    assert results["probabilities"][-1] == results["final_probability"]
    assert results["experiment"] == "stream" and results["interrupted"] is False
    assert len(results["words"]) == len(results["seconds"]) == len(results["probabilities"])
    assert results["words"][:3] == [7, 14, 21] and np.all(np.diff(results["seconds"]) >= 0)
    shown = [line.split() for line in done.stdout.decode().splitlines()]
    assert shown == [
        [str(words), f"{probability:.4f}"]
        for words, probability in zip(results["words"], results["probabilities"], strict=True)
    ]
    assert b"Warning: Glyph" not in done.stderr
    left = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert set(left) == {"flags.txt", "results.json", "stream.png"}
    assert left["stream.png"].startswith(b"\x89PNG")
    assert not any(b"costs" in content for content in left.values())


def test_ctrl_c_ends_the_text_and_keeps_what_was_read(trained, tmp_path):
    version, serve = trained
    process = subprocess.Popen(
        [*COMMAND, f"--model={version}", f"--run_dir={tmp_path}/run"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    with process:
        process.stdin.write(b"I love this fil")
        process.stdin.flush()
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    whole = serve(text=tf.constant(["I love this"]))["probability"].numpy().item()
    assert results["words"] == [1, 2, 3] and results["interrupted"] is True
    assert results["final_probability"] == pytest.approx(whole, abs=1e-5)
    assert lines[-1].decode() == f"3 {whole:.4f}\n"
    assert (tmp_path / "run" / "stream.png").exists()


@pytest.mark.parametrize("typed", [True, False])
def test_a_terminal_shows_the_curve(trained, typed, tmp_path):
    here, there = pty.openpty()
    with open(here, "r+b", buffering=0) as terminal:
        process = subprocess.Popen(
            [*COMMAND, f"--model={trained[0]}", f"--run_dir={tmp_path}/run"],
            stdin=there if typed else subprocess.PIPE, stdout=there, stderr=subprocess.PIPE,
            cwd=ROOT, env={**ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "30"},
        )  # fmt: skip
        os.close(there)
        (terminal if typed else process.stdin).write(b"I love this \n" + b"\x04" * typed)
        if not typed:
            process.stdin.close()
        shown = b"".join(iter(lambda: read_terminal(terminal), b"")).decode()
        assert process.wait(60) == 0, process.stderr.read()
        process.stderr.close()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert f"{results['final_probability']:.4f} after 3 words" in shown
    assert ("line by line; Ctrl-D" in shown) is typed
    assert "0.5 ┤" in shown and any("\u2800" < c < "\u2900" for c in shown)
    assert "I love this" in shown and "probability at the end" in shown


def read_terminal(terminal):
    try:
        return terminal.read(4096)
    except OSError:  # how Linux says that the other side has closed
        return b""


ERRORS = [
    (["--model={tmp}/none"], "no such model directory"),
    (["--model={tmp}"], "holds no version"),
    (["--model={tmp}/broken"], "does not load"),
    (["--model={models}/without_text"], "no `stream` signature from text"),
    (["--model={models}/toy", "--file={tmp}/none.txt"], "cannot be read"),
    (["--model={models}/toy", "--run_dir={tmp}/run"], "no word to read"),
]


def test_what_cannot_be_done_is_said_in_one_sentence(trained, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "saved_model.pb").write_bytes(b"no protocol buffer")
    models = trained[0].parent.parent
    runs = [[f.format(tmp=tmp_path, models=models) for f in flags] for flags, _ in ERRORS]
    results = several("experiments.stream", runs, text=" --\n", cwd=tmp_path)
    for (flags, message), (status, _, errors) in zip(ERRORS, results, strict=True):
        said = errors.strip().splitlines()[-1]
        assert status == 1 and "Traceback" not in errors, (flags, errors)
        assert message in said and "Received: " in said and "--" in said, (flags, said)
    assert not (tmp_path / "runs").exists()
