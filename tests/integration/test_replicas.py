"""Training on several replicas, in processes of their own."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).parents[1] / "replicas"
LIMIT = 240.0


def environment(**more):
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def workers(script, *arguments, count=2):
    """Starts one process for each worker."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    cluster = {"worker": addresses}
    return [
        subprocess.Popen(
            [sys.executable, "-u", HERE / script, *arguments],
            env=environment(
                TF_CONFIG=json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}})
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def outputs(processes, successful=True):
    """What each process has printed, when all of them have ended."""
    found = []
    try:
        for process in processes:
            out, error = process.communicate(timeout=LIMIT)
            assert (process.returncode == 0) == successful, error[-3000:]
            found.append(out)
    finally:
        for process in processes:
            process.kill()
    return found


def test_two_replicas_of_one_process():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "mirrored.py"]
    done = subprocess.run(
        command, cwd=HERE, env=environment(), capture_output=True, text=True, timeout=2 * LIMIT
    )
    assert done.returncode == 0, done.stdout[-5000:]


def test_two_workers_learn_what_one_device_learns():
    names = ["final_only", "reach all", "several an execution", "LazyAdam, clipped, final_only"]
    for out in outputs(workers("cases.py", *names)):
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert [line.pop("case") for line in lines] == names
        for line in lines:
            assert line.pop("states") < 5e-5
            assert max(line.values()) < 5e-6 and line["copies"] == line["steps"] == 0


def last_words(out):
    return next(line for line in out.splitlines() if line.startswith("resumed from"))


def test_a_worker_is_killed_and_all_are_resumed_to_the_bit(tmp_path):
    whole = [last_words(out) for out in outputs(workers("resumed.py", tmp_path / "whole"))]
    processes = workers("resumed.py", tmp_path / "part")
    for line in processes[0].stdout:
        if line.startswith("window 20"):
            break
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    outputs(processes, successful=False)
    assert time.monotonic() - killed < 60
    resumed = [last_words(out) for out in outputs(workers("resumed.py", tmp_path / "part"))]
    for one, other in zip(whole, resumed, strict=True):
        assert one.startswith("resumed from None") and "resumed from epoch-" in other
        assert one.split("sha ")[1] == other.split("sha ")[1]

    shutil.rmtree(tmp_path / "part" / "worker-1")
    processes = workers("resumed.py", tmp_path / "part")
    errors = [process.communicate(timeout=LIMIT)[1] for process in processes]
    assert all("no checkpoint in common" in error for error in errors)


def test_workers_read_shards_of_their_own_and_resume_to_the_bit(tmp_path):
    whole = outputs(workers("streamed.py", tmp_path / "whole"))
    processes = workers("streamed.py", tmp_path / "part")
    for line in processes[0].stdout:
        if line.startswith("window 20"):
            break
    processes[1].send_signal(signal.SIGKILL)
    outputs(processes, successful=False)
    resumed = outputs(workers("streamed.py", tmp_path / "part"))
    for one, other in zip(whole, resumed, strict=True):
        figures, digest = other.splitlines()[-2:]
        for differences in json.loads(figures).values():
            assert max(differences.values()) < 2e-6
        assert digest.split("sha ")[1] == last_words(one).split("sha ")[1]


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_to_one_worker_saves_on_all(tmp_path, number):
    processes = workers("resumed.py", tmp_path / "part")
    for line in processes[0].stdout:
        if line.startswith("window 20"):
            break
    processes[1].send_signal(number)
    for process in processes:
        process.communicate(timeout=LIMIT)
        assert process.returncode == 128 + number
    saved = [sorted(p.name for p in (tmp_path / f"part/worker-{i}").iterdir()) for i in (0, 1)]
    assert saved[0] == saved[1] and len(saved[0]) > 1


def test_the_main_job_on_two_workers_is_that_of_one(tmp_path):
    """Without dropout, which differs between workers."""
    found = []
    for count in (1, 2):
        command = [
            sys.executable, "-m", "experiments.imdb", "--window=30", f"--workers={count}",
            "--data=generated", "--limit=200", "--epochs=2", "--units=16", "--vocab_size=500",
            "--dropout=0", "--word_dropout=0", f"--run_dir={tmp_path / str(count)}",
            f"--export_dir={tmp_path / f'saved{count}'}",
        ]  # fmt: skip
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=LIMIT
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads((tmp_path / str(count) / "results.json").read_text()))
    one, several = found
    for a, b in zip(one["epochs"], several["epochs"], strict=True):
        for name in ("train_loss", "valid_loss", "valid_accuracy"):
            assert b[name] == pytest.approx(a[name], abs=1e-5)
    assert several["test_loss"] == pytest.approx(one["test_loss"], abs=1e-5)
