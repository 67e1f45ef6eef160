"""`python -m experiments.pretrain`, and what `experiments.imdb` makes of its encoder."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from integration.several import several

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


def test_killed_and_resumed_it_saves_the_same_encoder_to_the_bit(tmp_path):
    flags = [*SMALL, "--resume", "--backup_seconds=0", "--dropout=0.2", "--word_dropout=0.1"]
    finish(start(*flags, f"--run_dir={tmp_path}/whole"))
    process = start(*flags, f"--run_dir={tmp_path}/run")
    while not any((tmp_path / "run/backup").glob("epoch-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run/encoder").exists()
    finish(start(*flags, f"--run_dir={tmp_path}/run"))
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    about = json.loads((tmp_path / "run/encoder/encoder.json").read_text())
    assert (about["units"], about["embedding_dim"], about["vocabulary"]) == (8, 8, 50)
    output = finish(start(*flags, f"--run_dir={tmp_path}/run"))
    assert "This run is complete." in output


def test_an_untrained_language_model_gives_each_word_its_frequency():
    code = (
        "import json, numpy as np\n"
        "from absl import flags\n"
        "from experiments import pretrain\n"
        "flags.FLAGS(['', '--units=4', '--embedding_dim=4', '--samples=2'])\n"
        "model = pretrain.build_model(np.array([0, 6, 3, 1]), 'float32')\n"
        "bias = model.get_layer('logits').bias.numpy()\n"
        "print(json.dumps(np.exp(bias).tolist()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    # Each word once more, so that none is impossible.
    expected = [1 / 14, 7 / 14, 4 / 14, 2 / 14]
    assert json.loads(found.stdout) == pytest.approx(expected, rel=1e-6)


def test_one_command_trains_the_encoder_and_the_classifier_that_starts_from_it(tmp_path):
    small = [
        *("--data=generated", "--limit=60", "--lanes=8", "--units=8", "--embedding_dim=8"),
        *("--vocab_size=50", "--window=10", "--export_dir=", "--pretrain_epochs=1", "--epochs=2"),
    ]
    rates = ["--layer_decay=2.6", "--unfreeze_epochs=0.5"]
    more = {"plain": [], "pooled": ["--window_loss=pooled"], "gain": ["--window_loss=linear_gain"]}
    more["rates"] = rates
    runs = [
        [*small, "--pretrain", *flags, f"--run_dir={tmp_path}/{name}"]
        for name, flags in more.items()
    ]
    results = several("experiments.imdb", runs, cwd=tmp_path)
    for status, printed, errors in results:
        assert status == 0, errors
        assert "perplexity" in printed
    (encoder,) = tmp_path.glob("runs/pretrain/*/encoder")
    assert "experiments.pretrain" in results[0][1] and "This run is complete." in results[1][1]
    about = json.loads((encoder / "encoder.json").read_text())
    for name in more:
        found = json.loads((tmp_path / name / "results.json").read_text())
        assert found["pretrained"] == about and len(found["epochs"]) == 2
        assert found["window_loss"] == ("pooled" if name == "pooled" else "linear_gain")

    given = [f"--pretrained={encoder}", "--data=generated", "--limit=60", "--export_dir="]
    others = ["--lanes=8", "--window=10", "--epochs=2"]
    errors = [
        ([*given, "--units=16"], "leave out --units. Received: --units=16; the encoder has 8"),
        ([*given, "--pretrain"], "Received: --pretrain --pretrained="),
        ([*given, "--unfreeze_epochs=1"], "Received: --unfreeze_epochs=1.0 --epochs=2"),
        ([*given, "--pretrain", "--pretrained=", "--workers=2"], "Several workers cannot"),
        ([f"--pretrained={tmp_path}/plain", *given[1:]], "does not hold an encoder"),
        ([*given[1:], "--layer_decay=2"], "give --pretrained or --pretrain"),
        ([*given[1:], "--pretrain_epochs=7"], "leave out --pretrain_epochs"),
    ]
    (tmp_path / "damaged").mkdir()
    for file in encoder.iterdir():
        content = file.read_bytes()
        (tmp_path / "damaged" / file.name).write_bytes(
            content[:-9] if "npz" in file.name else content
        )
    errors.append(([f"--pretrained={tmp_path}/damaged", *given[1:]], "another checksum"))
    before = sorted(tmp_path.rglob("*"))
    runs = [[*others, *flags] for flags, _ in errors] + [
        # A complete run is one with the sizes of the encoder.
        [*others, *given, *rates, f"--run_dir={tmp_path}/rates2"],
        [*others, *given, *rates, f"--run_dir={tmp_path}/rates2", "--resume"],
    ]
    *refused, first, again = several("experiments.imdb", runs, cwd=tmp_path)
    for (flags, message), (status, _, printed) in zip(errors, refused, strict=True):
        assert status != 0, flags
        assert message in printed and "Traceback" not in printed, (flags, printed)
    assert first[0] == again[0] == 0 and "This run is complete." in again[1], again[2]
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("rates", "rates2")
    )
    assert one["test_loss"] == two["test_loss"]
    assert {p for p in sorted(tmp_path.rglob("*")) if "rates2" not in str(p)} == set(before)


def test_a_smaller_vocabulary_than_asked_for_is_no_contradiction(tmp_path):
    """The 60 generated reviews have about a hundred words."""
    small = [*("--data=generated", "--limit=60", "--window=10", "--lanes=8", "--export_dir=")]
    small += ["--pretrain", "--units=4", "--embedding_dim=4", "--vocab_size=500", "--epochs=1"]
    run = f"--run_dir={tmp_path}/run"
    ((status, _, errors),) = several("experiments.imdb", [[*small, run]], cwd=tmp_path)
    assert status == 0, errors
    again = [f"--flagfile={tmp_path}/run/flags.txt", run, "--resume"]
    other = [*small, "--precision=bfloat16", f"--run_dir={tmp_path}/other"]
    for flags in (again, other):
        ((status, _, errors),) = several("experiments.imdb", [flags], cwd=tmp_path)
        assert status == 0, errors
    assert len(list(tmp_path.glob("runs/pretrain/*"))) == 2


def test_a_run_goes_on_from_the_encoder_that_it_began_with(tmp_path):
    """The directory of the encoder has another one when the run is resumed."""
    flags = ["--data=generated", "--limit=60", "--held_out=6", "--epochs=1", "--lanes=8"]
    flags += ["--units=4", "--embedding_dim=4", "--samples=16", "--window=10"]
    both = [[*flags, f"--seed={seed}", f"--run_dir={tmp_path}/{seed}"] for seed in (0, 1)]
    for status, _, errors in several("experiments.pretrain", both, cwd=tmp_path):
        assert status == 0, errors
    shared = ["--data=generated", "--limit=60", "--epochs=2", "--export_dir=", "--resume"]
    shared += [f"--pretrained={tmp_path}/encoder", f"--run_dir={tmp_path}/run"]
    shutil.copytree(tmp_path / "0/encoder", tmp_path / "encoder")
    ((status, _, errors),) = several("experiments.imdb", [shared], cwd=tmp_path)
    assert status == 0, errors
    (tmp_path / "run/results.json").unlink()  # as if it had been killed before its end
    shutil.rmtree(tmp_path / "encoder")
    shutil.copytree(tmp_path / "1/encoder", tmp_path / "encoder")
    ((status, _, errors),) = several("experiments.imdb", [shared], cwd=tmp_path)
    assert status == 1 and "has begun from another encoder" in errors


def test_a_classifier_with_rates_by_layer_is_resumed_to_the_bit(tmp_path):
    finish(start(*SMALL, "--epochs=1", f"--run_dir={tmp_path}/language"))
    flags = [
        *(
            "--data=generated",
            "--limit=60",
            "--lanes=8",
            "--window=10",
            "--export_dir=",
            "--resume",
        ),
        *("--layer_decay=2.6", "--unfreeze_epochs=0.5", "--backup_seconds=0", "--epochs=3"),
        f"--pretrained={tmp_path}/language/encoder",
    ]
    finish(start(*flags, f"--run_dir={tmp_path}/whole", module="experiments.imdb"))
    process = start(*flags, f"--run_dir={tmp_path}/run", module="experiments.imdb")
    while not any((tmp_path / "run/backup").glob("epoch-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(start(*flags, f"--run_dir={tmp_path}/run", module="experiments.imdb"))
    sums = [
        (max((tmp_path / name / "backup").glob("epoch-*")) / "SHA256SUMS").read_text().split()
        for name in ("whole", "run")
    ]
    variables = [of[of.index("variables.data-00000-of-00001") - 1] for of in sums]
    assert variables[0] == variables[1]
