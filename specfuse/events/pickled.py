"""EventGPT's ``.npy`` files: a pickled dictionary of arrays x, y, t, p, read without running anything.

A pickle is a program: it names functions and calls them. Here its words are checked first (only those that
build numbers, text, dictionaries and calls), and every name it uses is looked up in a table of stand-ins that
this module defines. They understand the calls with which NumPy pickles a plain array and build the array from
its bytes themselves; no function of NumPy or of anything else can be reached from the file.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
from typing import Any, NoReturn

import numpy as np

from specfuse.events.npz import check_bytes, read_header
from specfuse.events.source import EventFile

# What a dictionary of arrays needs, in the protocols 3 and 4 that NumPy writes.
OPCODES = frozenset(
    """PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL REDUCE BUILD MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 BINFLOAT LONG1 BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
    EMPTY_DICT SETITEM SETITEMS""".split()  # noqa: SIM905  one a line would fill the screen
)
MOST_WORDS = 10_000  # a dictionary of four arrays takes about 120
PLAIN = re.compile(r"[<>|=]?[biuf][1248]")


def open_npy(path: str) -> EventFile:
    """Reads EventGPT's pickled dictionary, or maps an array with fields x, y, t and p.

    Raises:
        ValueError: anything else, and above all a file that asks for more than arrays of numbers.
    """
    try:
        with open(path, "rb") as file:
            shape, fortran, dtype = read_header(file)
            if not dtype.hasobject:
                file.seek(0)
                check_bytes(file, os.fstat(file.fileno()).st_size)
                order: Any = "F" if fortran else "C"
                # Nothing cannot be mapped.
                columns: Any = (
                    np.memmap(path, dtype, "r", file.tell(), shape, order)
                    if math.prod(shape)
                    else np.empty(shape, dtype)
                )
            elif shape == ():
                columns = unpickle(file.read())
            else:
                raise ValueError(f"an array of {shape} Python objects is not EventGPT's one dictionary")
        fields = getattr(getattr(columns, "dtype", None), "names", None)
        held = columns if isinstance(columns, dict) else fields or ()
        missing = [name for name in "xytp" if name not in held]
        if missing:
            raise ValueError(f"arrays x, y, t and p are needed; {', '.join(missing)} missing")
        if wrong := [name for name in "xytp" if not isinstance(columns[name], np.ndarray)]:
            raise ValueError(f"{wrong[0]} is not an array")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as events: {error}") from None
    return EventFile(path, "npy", {name: np.atleast_1d(columns[name]) for name in "xytp"})


def unpickle(data: bytes) -> Any:
    """What the pickle of a 0-dimensional object array holds, if that is made of plain arrays alone.

    Raises:
        ValueError: names what the pickle asks for beyond that. Nothing of it has run.
    """
    _check_words(data)
    try:
        # The implementation in Python: no table of its grows with numbers that the file names.
        value = _Unpickler(io.BytesIO(data)).load()
    except Refused as error:
        raise ValueError(str(error)) from None
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"its pickle is damaged: {error}") from None
    content = value.value if isinstance(value, _Array) else value
    if not isinstance(content, dict):
        return content
    return {key: inner.value if isinstance(inner, _Array) else inner for key, inner in content.items()}


class Refused(pickle.UnpicklingError):
    """The file asks for something that arrays of numbers do not need."""


def _check_words(data: bytes) -> None:
    try:
        for count, (word, _, _) in enumerate(pickletools.genops(data)):
            if word.name not in OPCODES:
                raise Refused(f"its pickle uses {word.name}, which arrays of numbers do not need")
            if count >= MOST_WORDS:
                raise Refused(f"its pickle is longer than {MOST_WORDS} words")
    except Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        raise ValueError(f"its pickle is damaged: {error}") from None


class _Name:
    """A name that a pickle may use. Without attributes, so that a file cannot leave anything behind."""

    __slots__ = ()


class _NdarrayName(_Name):
    """``numpy.ndarray``, only ever handed to ``_reconstruct``."""

    __slots__ = ()


class _DtypeName(_Name):
    """``numpy.dtype(kind, align, copy)``."""

    __slots__ = ()

    def __call__(self, kind: object = None, align: object = False, copy: object = True) -> _Dtype:
        return _Dtype(kind)


class _ReconstructName(_Name):
    """``_reconstruct(numpy.ndarray, (0,), b"b")``: an array that ``BUILD`` fills."""

    __slots__ = ()

    def __call__(self, kind: object, shape: object = None, code: object = None) -> _Array:
        if not isinstance(kind, _NdarrayName):
            _refuse("its pickle builds something other than an array")
        return _Array()


class _ScalarName(_Name):
    """``scalar(dtype, bytes)``: one number."""

    __slots__ = ()

    def __call__(self, kind: object, raw: object) -> Any:
        match kind, raw:
            case _Dtype(dtype=np.dtype() as dtype), bytes(raw):
                return np.frombuffer(raw, dtype).reshape(())[()]
        _refuse("its pickle has a single value that is no plain number")


class _Dtype:
    """Stands for a type of NumPy: a number, or a Python object for the outermost array alone."""

    __slots__ = ("dtype",)

    def __init__(self, kind: object) -> None:
        if kind in ("O", "O8"):
            self.dtype: np.dtype | None = None
        elif isinstance(kind, str) and PLAIN.fullmatch(kind):
            self.dtype = np.dtype(kind)
        else:
            _refuse(f"its pickle asks for the type {kind!r}, which is no plain number")

    def __setstate__(self, state: object) -> None:
        # (version, byte order, subarray, names, fields, size, alignment, flags)
        match state:
            case (int(), "<" | ">" | "|" | "=" as order, None, None, None, *_):
                if self.dtype is not None:
                    self.dtype = self.dtype.newbyteorder(order)
            case _:
                _refuse("its pickle asks for a type with parts")


class _Array:
    """Stands for an array until its bytes are known."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = None

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple(shape), _Dtype(dtype=np.dtype() as dtype), bool(fortran), bytes(raw)):
                if not all(type(side) is int and side >= 0 for side in shape):
                    _refuse(f"its pickle has an array of shape {shape!r}")
                # Checks that the bytes are as many as the shape wants.
                flat = np.frombuffer(raw, dtype)
                self.value = flat.reshape(shape, order="F" if fortran else "C")
            case (int(), (), _Dtype(dtype=None), bool(), [content]):
                self.value = content
            case _:
                _refuse("its pickle has an array that is neither of plain numbers nor one object")


NAMES: dict[tuple[str, str], _Name] = {
    ("numpy", "ndarray"): _NdarrayName(),
    ("numpy", "dtype"): _DtypeName(),
    # NumPy 2 moved the module.
    ("numpy.core.multiarray", "_reconstruct"): _ReconstructName(),
    ("numpy._core.multiarray", "_reconstruct"): _ReconstructName(),
    ("numpy.core.multiarray", "scalar"): _ScalarName(),
    ("numpy._core.multiarray", "scalar"): _ScalarName(),
}


class _Unpickler(pickle._Unpickler):
    """Looks every name up in NAMES."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            _refuse(f"its pickle asks for {module}.{name}, which is not needed for arrays of numbers")
        return NAMES[module, name]

    def persistent_load(self, pid: object) -> NoReturn:
        _refuse("its pickle refers to something outside of the file")


def _refuse(text: str) -> NoReturn:
    raise Refused(text)
