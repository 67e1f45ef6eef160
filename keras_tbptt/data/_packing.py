"""The plan of an epoch: which steps of which document each lane processes in each window."""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass

import numpy as np

IDLE = -1


@dataclass(frozen=True)
class Plan:
    """What each lane processes in each window of an epoch. Arrays are int32 `[windows, lanes]`.

    Attributes:
        document: The index of the document, or -1 where the lane is idle.
        begin: The first step of the document's stretch; 0 if the epoch has the whole document.
        offset: Steps of the stretch before the window.
        length: Real steps of the window; 0 where the lane is idle.
        total: Steps of the whole stretch; 0 where the lane is idle.
    """

    document: np.ndarray
    begin: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    total: np.ndarray

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """bool `[windows, lanes]`: whether the window begins a document."""
        return (self.document != IDLE) & (self.offset == 0)

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """bool `[windows, lanes]`: whether the window ends a document."""
        return (self.document != IDLE) & (self.offset + self.length == self.total)


class Packing:
    """Distributes documents over lanes, so that every epoch has the same number of windows.

    A place is a lane and a number of windows in it. Documents are sorted by their number of
    windows, and each gets a place, once. An epoch swaps only documents with equal numbers of
    windows, and changes the order of the places. Therefore its length does not change.

    Args:
        lengths: ints `[documents]` >= 1. Steps of each document.
        window: int >= 1. Steps in a window.
        lanes: int >= 1. Rows of the batch.
        mean_window: Optional int >= 2. The mean of random window lengths. Defaults to None:
            windows are full.
        stretch: Optional int >= 1. How many windows an epoch has of a longer document. Defaults to
            None: all.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        window: int,
        lanes: int,
        mean_window: int | None = None,
        stretch: int | None = None,
    ):
        self.window = window
        self.mean_window = mean_window
        self.lanes = lanes
        usual = mean_window or window
        whole = np.asarray(lengths, "int64")
        self.lengths = whole if stretch is None else np.minimum(whole, stretch * usual)
        self.left_out = whole - self.lengths
        self.counts = -(-self.lengths // usual)
        self.order = np.argsort(-self.counts, kind="stable")
        self.sorted_counts = self.counts[self.order]
        self.steps = self._deal()

    def plan(self, seed: tuple[int, int], shuffle: bool) -> Plan:
        """The plan of one epoch.

        Args:
            seed: `(seed, epoch)`. Every draw depends on these alone.
            shuffle: bool. Whether the documents take a new order.
        """
        order, rank = self.order, None
        if shuffle:
            # Raw PCG64 output, unlike Generator's methods, is promised never to change (NEP 19).
            bits = np.random.PCG64(np.random.SeedSequence(seed))
            order = np.lexsort((bits.random_raw(len(order)), -self.counts))
            rank = bits.random_raw(len(order))
        lane, begin = self._lay_out(order, rank)

        counts = self.sorted_counts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        cell = np.repeat(begin, counts) + within, np.repeat(lane, counts)
        plan = Plan(
            np.full((self.steps, self.lanes), IDLE, "int32"),
            *(np.zeros((self.steps, self.lanes), "int32") for _ in range(4)),
        )
        plan.document[cell] = np.repeat(order, counts)
        plan.total[cell] = np.repeat(self.lengths[order], counts)
        if self.left_out.any():
            first = _uniform(len(order), *seed, 2) * (self.left_out[order] + 1)
            plan.begin[cell] = np.repeat(first.astype("int64"), counts)
        if self.mean_window is None:
            plan.offset[cell] = within * self.window
            plan.length[cell] = np.minimum(plan.total[cell] - plan.offset[cell], self.window)
        else:
            lengths = _draw_lengths(
                self.lengths[order], counts, self.mean_window, self.window, (*seed, 1)
            )
            read = np.cumsum(lengths) - lengths
            plan.offset[cell] = read - np.repeat(read[within == 0], counts)
            plan.length[cell] = lengths
        return plan

    def _deal(self) -> int:
        """Gives places to the sorted documents; returns the number of windows in an epoch."""
        raise NotImplementedError

    def _lay_out(self, order: np.ndarray, rank: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The lane and the first window, each int64 `[documents]`, of each place in `order`."""
        raise NotImplementedError


def _draw_lengths(
    totals: np.ndarray, counts: np.ndarray, mean: int, longest: int, seed: tuple[int, ...]
) -> np.ndarray:
    """Draws the lengths of all windows: int64 `[sum of counts]`.

    Document i has `counts[i]` windows, whose lengths sum to `totals[i]`. The draws follow Merity et
    al. 2018, "Regularizing and optimizing LSTM language models", section 4.1, in proportion to
    `mean`: 19 of 20 lengths are normal around `mean`, and the others are normal around half of
    `mean`. The standard deviation is mean * 5 / 70. The lengths of a document are then scaled so
    that their sum is right.
    """
    cells = int(counts.sum())
    normal, angle, chance = (_uniform(cells, *seed, stream) for stream in range(3))
    normal = np.sqrt(-2 * np.log1p(-normal)) * np.cos(2 * np.pi * angle)  # Box and Muller 1958
    centre = np.where(chance < 0.05, 0.5, 1.0)
    drawn = np.maximum(centre + normal * 5 / 70, 0.1)

    first = np.cumsum(counts) - counts
    total = lambda values: np.repeat(np.add.reduceat(values, first), counts)  # noqa: E731
    wanted = np.repeat(totals, counts)
    # Without these margins, the rounding below could make a window empty, or one step too long.
    low, high = 1 + 1e-6, longest - 1e-6
    lengths = np.clip(drawn * wanted / total(drawn), low, high)
    missing = wanted - total(lengths)
    room = np.where(missing > 0, high - lengths, lengths - low)
    lengths = lengths + missing * room / np.maximum(total(room), 1e-12)

    ends = np.cumsum(lengths)
    ends = np.floor(ends - np.repeat((ends - lengths)[first], counts) + 0.5).astype("int64")
    last = np.cumsum(counts) - 1
    ends[last] = totals
    begins = np.append(0, ends[:-1])
    begins[first] = 0
    return ends - begins


def _uniform(count: int, *seed: int) -> np.ndarray:
    """Floats in [0, 1), the same in every version of NumPy (see `Packing.plan`)."""
    return (np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count) >> 11) * 2.0**-53


class Packed(Packing):
    """Lanes run independently: when a document ends, the lane begins the next one.

    The longest document is placed first, and each document goes to the lane with the fewest windows
    (Graham 1969, "Bounds on multiprocessing timing anomalies", section 3). Lanes therefore have
    nearly equal numbers of windows.
    """

    def _deal(self) -> int:
        loads = [(0, lane) for lane in range(self.lanes)]
        lane_of_place = np.empty(len(self.order), "int64")
        for place, count in enumerate(self.sorted_counts.tolist()):
            load, lane = loads[0]
            lane_of_place[place] = lane
            heapq.heapreplace(loads, (load + count, lane))
        self._lane = lane_of_place
        return max(load for load, _ in loads)

    def _lay_out(self, order: np.ndarray, rank: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        reading = np.lexsort((order if rank is None else rank, self._lane))
        counts, lane = self.sorted_counts[reading], self._lane[reading]
        before = np.cumsum(counts) - counts
        first = np.searchsorted(lane, lane)  # where the lane begins in `reading`
        begin = np.empty_like(before)
        begin[reading] = before - before[first]
        return self._lane, begin


class Aligned(Packing):
    """Documents with similar numbers of windows form a group, and begin together.

    A group has at most one document per lane. The next group begins when the longest document of
    the group has ended (this is the bucketing of Khomenko et al. 2016, "Accelerating recurrent
    neural network training using sequence bucketing", section 3).
    """

    def _deal(self) -> int:
        self._group, self._lane = np.divmod(np.arange(len(self.order)), self.lanes)
        self._group_counts = self.sorted_counts[:: self.lanes]
        return int(self._group_counts.sum())

    def _lay_out(self, order: np.ndarray, rank: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        groups = len(self._group_counts)
        reading = np.arange(groups) if rank is None else np.argsort(rank[:groups], kind="stable")
        counts = self._group_counts[reading]
        begin = np.empty_like(counts)
        begin[reading] = np.cumsum(counts) - counts
        return self._lane, begin[self._group]


PACKINGS = {"packed": Packed, "aligned": Aligned}
