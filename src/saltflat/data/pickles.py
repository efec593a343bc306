"""Reads a pickle that holds plain data and arrays of numbers, and refuses every other one before any of it runs.

A pickle is a program: it may name any importable function and call it. This reader looks names up in a table of five,
the ones that an array of numbers is made of, and each stands for a harmless part of this file; whatever else is named
ends the reading there and then. Source: "Restricting Globals" in the documentation of Python's `pickle`.
"""

import io
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray


def load(data: bytes, source: str) -> Any:
    """The dictionary (or list, array, number) in the pickle `data`; strings that Python 2 wrote come as bytes.

    `source` names the file in messages. Arrays may stand alone or as values of the dictionary, not deeper.

    Raises ValueError, in one line, for a pickle that names anything but the parts of an array of numbers, and for one
    that is cut or damaged.

    >>> load(pickle.dumps({"labels": [3, 1]}), "data_batch_1")
    {'labels': [3, 1]}
    >>> load(pickle.dumps(print), "data_batch_1")
    Traceback (most recent call last):
    ValueError: data_batch_1: refused, the pickle names 'builtins.print'; only plain data and arrays of numbers are read
    """
    try:
        return _with_arrays(_Unpickler(data).load())
    except _RefusedError as refused:
        raise ValueError(f"{source}: refused, {refused}; only plain data and arrays of numbers are read") from None
    except Exception as error:  # a damaged pickle can fail in any of its operations
        words = " ".join(str(error).split())  # some of Python's own have several lines
        raise ValueError(f"{source}: not a whole pickle ({type(error).__name__}: {words})") from error


class _RefusedError(Exception):
    """The pickle asks for something that data does not need."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise _RefusedError(f"the pickle names {module + '.' + name!r}") from None


# The stand-ins. A real ndarray or dtype would take its state from the pickle in C, all but unchecked; and numpy >= 2.4
# warns about the way in which Python 2 wrote a dtype.


class _Dtype:
    """Stands for numpy.dtype(code, align, copy); its state has the byte order in second place."""

    def __init__(self, code: str | bytes, *_flags: object) -> None:
        self.code = _text(code)
        if self.code not in {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}:
            raise _RefusedError(f"the pickle holds an array of {self.code!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = _text(state[1])
        if order not in {"<", ">", "|", "="}:
            raise _RefusedError(f"the pickle holds an array of byte order {order!r}")
        self.code = order + self.code[-2:]


class _Array:
    """Stands for an array that is still empty; its state is (version, shape, dtype, is_fortran, bytes)."""

    def __init__(self, *_subtype_shape_code: object) -> None:
        self.array: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.array = np.frombuffer(data, dtype.code).reshape(shape, order="F" if is_fortran else "C").copy()


def _encode(text: str, encoding: str) -> bytes:
    """Stands for _codecs.encode: how Python 3 writes bytes in old protocols."""
    if encoding != "latin1":
        raise _RefusedError(f"the pickle encodes text as {encoding!r}")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,  # numpy < 2, and so the published archives
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


def _text(value: str | bytes) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else value


def _with_arrays(content: Any) -> Any:
    """`content`, or the values of the dictionary that it is, with arrays in the places of their stand-ins."""
    if isinstance(content, dict):  # one level, as in the archives: deeper, shared lists could unfold without end
        return {key: _array(value) for key, value in content.items()}
    return _array(content)


def _array(value: Any) -> Any:
    return value.array if isinstance(value, _Array) else value
