"""Where each document, or each stream, begins in the flat array, and how many steps it has."""

from __future__ import annotations

import numpy as np


def documents(bounds: np.ndarray, next_step: bool) -> tuple[np.ndarray, np.ndarray]:
    """Documents as they are.

    Args:
        bounds: int64 `[documents + 1]`. The offsets of documents.
        next_step: bool. Whether the last step of a document is a target only.

    Returns:
        The first step and the number of input steps of each document, int64 `[documents]`.

    Raises:
        ValueError: If a document has no next step.
    """
    lengths = np.diff(bounds) - next_step
    short = np.flatnonzero(lengths == 0)
    if len(short):
        raise ValueError(
            "A document needs at least two steps for one to be the next: drop shorter ones, or "
            f"run documents together with streams=True. Received: {len(short)} documents of one "
            f"step, the first of them `sequences[{short[0]}]`"
        )
    return bounds[:-1], lengths


def streams(bounds: np.ndarray, next_step: bool, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """All documents run together, and cut into contiguous streams of equal length, up to one step.

    Args:
        bounds: As in `documents`.
        next_step: As in `documents`, for the last step of all.
        lanes: int. How many streams.

    Returns:
        As `documents`, for the streams: `lanes` of them, or one per step if there are fewer steps.

    Raises:
        ValueError: If there is no next step.
    """
    steps = int(bounds[-1] - bounds[0]) - next_step
    if steps < 1:
        raise ValueError(
            "A sequence needs at least two steps for one to be the next. "
            f"Received: {bounds[-1] - bounds[0]} steps in all"
        )
    lanes = min(lanes, steps)
    edges = bounds[0] + np.arange(lanes + 1) * steps // lanes
    return edges[:-1], np.diff(edges)
