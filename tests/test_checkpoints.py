import numpy as np
import pytest
import tensorflow as tf

from keras_tbptt.callbacks._checkpoints import CheckpointDirectory, DamagedCheckpointError

FILES = ["SHA256SUMS", "about.json", "arrays.npz", "variables.data-00000-of-00001"]
FILES.append("variables.index")


def variables(value):
    return [tf.Variable(tf.fill([3, 2], float(value))), tf.Variable(tf.constant(value))]


def write(directory, name, value):
    return directory.write(name, variables(value), {"value": value, "a": np.arange(value)})


def test_what_was_written_is_read(tmp_path):
    directory = CheckpointDirectory(tmp_path / "new", keep=3)
    assert directory.newest_first() == []
    path = write(directory, "one", 7)
    assert sorted(file.name for file in path.iterdir()) == FILES
    restored = variables(0)
    directory.restore(path, restored)
    np.testing.assert_array_equal(restored[0], np.full([3, 2], 7.0))
    assert restored[1] == 7
    about = directory.read_about(path)
    assert about["value"] == 7
    np.testing.assert_array_equal(about["a"], np.arange(7))


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.int64(7), np.bool_(True), float("inf")])
def test_a_number_stays_a_number(value, tmp_path):
    directory = CheckpointDirectory(tmp_path, keep=1)
    path = directory.write("one", variables(7), {"value": [value]})
    (read,) = directory.read_about(path)["value"]
    assert type(read) is type(value) and read == value


def test_the_last_few_stay(tmp_path):
    directory = CheckpointDirectory(tmp_path, keep=2)
    for value in range(4):
        write(directory, f"checkpoint-{value}", value)
    assert [p.name for p in directory.newest_first()] == ["checkpoint-3", "checkpoint-2"]


DAMAGES = {
    "empty": lambda content, at: b"",
    "truncated": lambda content, at: content[:at],
    "flipped": lambda content, at: (
        content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]
    ),
    "longer": lambda content, at: content + b"0",
    "gone": lambda content, at: None,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen_wherever_it_is(name, damage, tmp_path):
    directory = CheckpointDirectory(tmp_path, keep=2)
    path = write(directory, "one", 7)
    sound = (path / name).read_bytes()
    for at in range(0, len(sound), max(1, len(sound) // 20)):
        content = DAMAGES[damage](sound, at)
        if content is None:
            (path / name).unlink(missing_ok=True)
        else:
            (path / name).write_bytes(content)
        with pytest.raises(DamagedCheckpointError):
            directory.read_about(path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    directory = CheckpointDirectory(tmp_path, keep=1)
    path = write(directory, "one", 7)
    with pytest.raises(TypeError):
        directory.write("two", variables(8), {"value": object()})
    assert list(tmp_path.iterdir()) == [path]
    assert directory.read_about(path)["value"] == 7


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    directory = CheckpointDirectory(tmp_path, keep=3)
    (tmp_path / ".partial-x").mkdir()
    assert directory.newest_first() == []
    path = write(directory, "one", 7)
    assert list(tmp_path.iterdir()) == [path]
