"""Reads a pickle that holds plain data and arrays of numbers, and refuses every other one before any of it runs.

A pickle is a program: it may name any importable function and call it. This reader looks names up in a table of seven,
the ones that an array of numbers is made of, and each stands for a harmless part of this file; whatever else is named
ends the reading there and then. Source: "Restricting Globals" in the documentation of Python's `pickle`.
"""

import io
import pickle
import pickletools
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
        _check_bounded(data)
        return _with_arrays(_Unpickler(data).load())
    except _RefusedError as refused:
        raise ValueError(f"{source}: refused, {refused}; only plain data and arrays of numbers are read") from None
    except Exception as error:  # a damaged pickle can fail in any of its operations
        words = " ".join(str(error).split())  # some of Python's own have several lines
        raise ValueError(f"{source}: not a whole pickle ({type(error).__name__}: {words})") from error


AGAIN = 16  # so that what is hashed is at most 2^16 times what is in the file


class _RefusedError(Exception):
    """The pickle asks for something that data does not need."""


def _check_bounded(data: bytes) -> None:
    """Refuses a small pickle that would take all memory or time. Python's reader makes room for every place up to the
    highest that is named, so they have to be numbered one by one, as writers do; and tuples within tuples, each twice
    the one before, take for ever to be hashed, so few may be taken again.
    """
    places, tuples, again, last = 0, set[int](), 0, ""
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = places if name == "MEMOIZE" else int(argument or 0)
            if place > places + 1:
                raise _RefusedError(f"the pickle numbers its parts up to {place}")
            places = max(places, place + 1)
            (tuples.add if "TUPLE" in last else tuples.discard)(place)
        elif name == "DUP" or (name in ("GET", "BINGET", "LONG_BINGET") and int(argument or 0) in tuples):
            again += 1
        if again > AGAIN:
            raise _RefusedError(f"the pickle takes tuples again more than {AGAIN} times")
        last = name


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise _RefusedError(f"the pickle names {module + '.' + name!r}") from None


# The stand-ins. A real ndarray or dtype would take its state from the pickle in C, all but unchecked; and numpy >= 2.4
# warns about the way in which Python 2 wrote a dtype. Functions are objects without attributes, since a pickle may set
# those of whatever it has named.


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
        self.array = _numbers(data, dtype).reshape(shape, order="F" if is_fortran else "C").copy()


def _numbers(data: object, dtype: object) -> NDArray[Any]:
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _Dtype):
        raise _RefusedError("the pickle holds an array of something else than bytes")
    return np.frombuffer(data, dtype.code)


class _FromBuffer:
    """Stands for numpy's _frombuffer(bytes, dtype, shape, order, axes): how protocol 5 writes an array. In order "K" it
    is an array in the order of C whose axes are transposed.
    """

    __slots__ = ()

    def __call__(self, data: object, dtype: object, shape: Any, order: Any, axes: Any = None) -> _Array:
        read, numbers = _Array(), _numbers(data, dtype)
        transposed = order == "K" and axes is not None
        array = numbers.reshape(shape).transpose(axes) if transposed else numbers.reshape(shape, order=order)
        read.array = array.copy()
        return read


class _Encode:
    """Stands for _codecs.encode: how Python 3 writes bytes in old protocols."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise _RefusedError("the pickle encodes text in another way than latin1")
        return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,  # numpy < 2, and so the published archives
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer(),
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer(),
    ("_codecs", "encode"): _Encode(),
}


def _text(value: object) -> str:
    if not isinstance(value, str | bytes):
        raise _RefusedError("the pickle has other things in the place of a name")
    return value.decode("ascii") if isinstance(value, bytes) else value


def _with_arrays(content: Any) -> Any:
    """`content`, or the values of the dictionary that it is, with arrays in the places of their stand-ins."""
    if isinstance(content, dict):  # one level, as in the archives: deeper, shared lists could unfold without end
        return {key: _array(value) for key, value in content.items()}
    return _array(content)


def _array(value: Any) -> Any:
    return value.array if isinstance(value, _Array) else value
