"""DSEC's HDF5 layout: ``events/x, y, t, p``, ``ms_to_idx`` and ``t_offset``, compressed with Blosc.

Source: Gehrig et al. 2021, "DSEC: A Stereo Event Camera Dataset for Driving Scenarios", and its data format
page: ``t[ms_to_idx[ms]] >= 1000 ms`` and ``t[ms_to_idx[ms] - 1] < 1000 ms``, both before adding ``t_offset``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from specfuse.events.source import EventFile
from specfuse.events.stream import EventStream

SENSOR = (480, 640)  # height and width of DSEC's cameras; its files do not tell
CHUNK = 1 << 16  # events compressed together: half a millisecond to 30, and what a slice reads too much


def open_dsec(path: str) -> EventFile:
    """Opens a file in DSEC's layout; slices are read when they are asked for.

    Raises:
        ImportError: h5py or hdf5plugin is not installed.
        ValueError: not such a file, or a broken one.
    """
    h5py = _h5py()
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is not a whole HDF5 file (truncated?): {error}") from None
    try:
        columns = {name: _column(file, path, f"events/{name}") for name in "xytp"}
        index = _column(file, path, "ms_to_idx")[:] if "ms_to_idx" in file else None
        if index is not None and index.dtype.kind not in "iu":
            raise ValueError(f"{path}: ms_to_idx must hold whole numbers, got {index.dtype}")
        offset = _number(path, "t_offset", file["t_offset"][()]) if "t_offset" in file else 0
        given = [file["events"].attrs.get(side) for side in ("height", "width")]
        height, width = (_number(path, "the sensor's size", side or 0) for side in given)
        size = SENSOR if None in given else (height, width)
        return EventFile(path, "hdf5", columns, size, offset, index, file.close)
    except (OSError, TypeError, ValueError) as error:
        file.close()
        if str(error).startswith(path):
            raise
        raise ValueError(f"{path} cannot be read as DSEC's events: {error}") from None
    except BaseException:
        file.close()
        raise


def write_dsec(path: str | os.PathLike[str], stream: EventStream, compress: bool = True) -> None:
    """Writes a stream in DSEC's layout; the sensor's size goes into attributes of ``events``.

    Args:
        path: of the file; replaced when it is complete.
        stream: E events.
        compress: with Blosc (zstd), as DSEC's own files.

    Raises:
        ImportError: h5py or hdf5plugin is not installed.
    """
    h5py = _h5py()
    import hdf5plugin

    offset = int(stream.t[0]) if len(stream) else 0
    t = stream.t - offset
    # DSEC counts in 32 bits: 71 minutes.
    times = t.astype(np.uint32 if stream.duration_us < 2**32 else np.uint64)
    milliseconds = np.arange(stream.duration_us // 1000 + 1 if len(stream) else 0, dtype=np.int64)
    packed: dict[str, Any] = hdf5plugin.Blosc(cname="zstd", clevel=1) if compress else {}
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with h5py.File(part, "w") as file:
            group = file.create_group("events")
            for name, values in {"x": stream.x, "y": stream.y, "t": times, "p": stream.p}.items():
                # HDF5 cuts nothing into no chunks.
                layout = {"chunks": (min(CHUNK, len(values)),), **packed} if len(values) else {}
                group.create_dataset(name, data=values, **layout)
            group.attrs["height"], group.attrs["width"] = stream.height, stream.width
            file["ms_to_idx"] = np.searchsorted(t, milliseconds * 1000, side="left").astype(np.uint64)
            file["t_offset"] = np.int64(offset)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


class _Column:
    """A dataset of an HDF5 file whose errors name the file."""

    def __init__(self, dataset: Any, path: str) -> None:
        self._dataset, self._path = dataset, path

    @property
    def dtype(self) -> np.dtype:
        return self._dataset.dtype

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self._dataset[index]
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{self._path}: {self._dataset.name} cannot be read: {error}") from None


def _column(file: Any, path: str, name: str) -> _Column:
    dataset = file.get(name)
    if dataset is None:
        held: list[str] = []
        file.visit(held.append)
        raise ValueError(
            f"{path} must hold {name}, as DSEC's files do; it holds {', '.join(held) or 'nothing'}"
        )
    if len(getattr(dataset, "shape", ())) != 1 or dataset.dtype.kind not in "iubf":
        raise ValueError(f"{path}: {name} must be a one-dimensional array of numbers, got {dataset}")
    return _Column(dataset, path)


def _number(path: str, name: str, value: Any) -> int:
    """A single whole number."""
    number = np.asarray(value)
    if number.size == 1 and number.dtype.kind in "iuf" and float(number.item()).is_integer():
        return int(number.item())
    raise ValueError(f"{path}: {name} must be one whole number, got {value}")


def _h5py() -> Any:
    try:
        import h5py
        import hdf5plugin  # noqa: F401  registers Blosc, which DSEC's files are compressed with
    except ImportError as error:
        raise ImportError(
            f"HDF5 events need h5py and hdf5plugin ({error}): pip install 'specfuse[events]'"
        ) from None
    return h5py
