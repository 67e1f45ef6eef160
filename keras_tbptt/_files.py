"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def partial_directory(parent: pathlib.Path, prefix: str) -> Iterator[pathlib.Path]:
    """A new directory to fill and then to rename; an error deletes it.

    Args:
        parent: Where it is made: on the same file system as its final place.
        prefix: str. How its name begins.
    """
    partial = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_whole(path: pathlib.Path, content: bytes) -> pathlib.Path:
    """Writes a file beside its place and renames it; an error leaves the old file as it was.

    Args:
        path: The file. Its directory is made if it is missing.
        content: What it holds.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial_directory(path.parent, f".{path.name}-") as partial:
        written = partial / path.name
        written.write_bytes(content)
        os.replace(written, path)
    partial.rmdir()
    return path
