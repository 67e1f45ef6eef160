"""`python -m experiments.pretrain`, and what `experiments.imdb` makes of its encoder."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
SMALL = [
    *("--data=generated", "--limit=60", "--held_out=6", "--epochs=3", "--lanes=8", "--units=8"),
    *("--embedding_dim=8", "--vocab_size=50", "--window=10", "--samples=16"),
]


def start(*flags, module="experiments.pretrain"):
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def finish(process):
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def content(run):
    return {p.name: p.read_bytes() for p in (run / "encoder").iterdir()}


@pytest.mark.parametrize("wait", [0.0, 1.0])
def test_killed_and_resumed_it_saves_the_same_encoder_to_the_bit(wait, tmp_path):
    flags = [*SMALL, "--resume", "--backup_seconds=0", "--dropout=0.2", "--word_dropout=0.1"]
    finish(start(*flags, f"--run_dir={tmp_path}/whole"))
    process = start(*flags, f"--run_dir={tmp_path}/run")
    while not any((tmp_path / "run/backup").glob("epoch-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run/encoder").exists()
    finish(start(*flags, f"--run_dir={tmp_path}/run"))
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    about = json.loads((tmp_path / "run/encoder/encoder.json").read_text())
    assert (about["units"], about["embedding_dim"], about["vocabulary"]) == (8, 8, 50)
    output = finish(start(*flags, f"--run_dir={tmp_path}/run"))
    assert "This run is complete." in output
