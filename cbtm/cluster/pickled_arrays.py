"""Numbers out of the records of a pickle: NumPy arrays and scalars, SciPy diagonals, torch tensors.

Neither NumPy's nor torch's own constructors are called with arguments from the file: a length, a shape and an element
type are read out of the record, compared with the bytes that are there, and only then become a view of these bytes.
A tensor that was saved on a GPU is read like any other, since a device is only a word beside the bytes, and torch is
not needed: a pickled storage is a small file in the format that torch.save had before version 1.6. It has no
compression, so nothing in it can grow. (The zip format of later versions is never found inside of a pickle.)
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.unpickle import PERSISTENT_ID, Name, Record, read_pickle, shown
from cbtm.errors import DataError


def _spelled(modules: list[str], name: str) -> frozenset[Name]:
    return frozenset(Name(module, name) for module in modules)


_CORE = ["numpy.core", "numpy._core"]  # NumPy 1 and 2
_RECONSTRUCT = _spelled([f"{core}.multiarray" for core in _CORE], "_reconstruct")
_SCALAR = _spelled([f"{core}.multiarray" for core in _CORE], "scalar")
_FROM_BUFFER = _spelled([f"{core}.numeric" for core in _CORE], "_frombuffer")
_NDARRAY, _DTYPE = Name("numpy", "ndarray"), Name("numpy", "dtype")
_CSR = _spelled(["scipy.sparse.csr", "scipy.sparse._csr"], "csr_matrix")
_DIA = _spelled(["scipy.sparse.dia", "scipy.sparse._dia"], "dia_matrix")
_ENCODE = Name("_codecs", "encode")  # how protocol 2 spells bytes
_TENSOR, _STORAGE = Name("torch._utils", "_rebuild_tensor_v2"), Name("torch.storage", "_load_from_bytes")

ARRAY_NAMES = _RECONSTRUCT | _SCALAR | _FROM_BUFFER | _CSR | _DIA | {_NDARRAY, _DTYPE, _ENCODE}
"""Names in the pickle of a NumPy array or scalar or of a SciPy matrix."""
TENSOR_NAMES = frozenset({_TENSOR, _STORAGE, _ENCODE, Name("collections", "OrderedDict")})
"""Names in the pickle of a torch tensor."""

_ELEMENT_TYPES = {"f4", "f8", "i4", "i8"}
_STORAGE_TYPES: dict[Name, np.dtype[Any]] = {
    Name("torch", "FloatStorage"): np.dtype("<f4"),
    Name("torch", "DoubleStorage"): np.dtype("<f8"),
}
# The first two of the five pickles that open a legacy torch file, and what the third must say.
_TORCH_MAGIC, _TORCH_VERSION = 0x1950A86A20F9469CFC6C, 1001


def refusal(source: str, what: str, why: str) -> DataError:
    """The error that says: `what` in `source` is wrong, because `why`."""
    return DataError(f"{source}: {what} {why}; the file is damaged or is not of the reference implementation")


def read_array(value: object, source: str, what: str) -> NDArray[Any]:
    """The array that a record describes, as a view of the file's bytes where they are in row-major order.

    Args:
        value: From `read_pickle`.
        source: Name of the file, for messages.
        what: Name of the array, for messages.

    Returns:
        Array of float32, float64, int32 or int64 in the file's byte order.

    Raises:
        DataError: If the record describes no such array, or another number of bytes than it holds.
    """
    match value:
        case Record(name, (kind, _, _), (_, shape, dtype, is_fortran, raw)) if name in _RECONSTRUCT:
            if kind != _NDARRAY:
                raise refusal(source, what, f"is {shown(kind)}, not a numpy.ndarray")
            order = "F" if is_fortran else "C"
        case Record(name, (raw, dtype, shape, order), None) if name in _FROM_BUFFER and order in ("C", "F"):
            pass
        case _:
            raise refusal(source, what, f"is {shown(value)}, not an array")
    element, content = _read_dtype(dtype, source, what), _read_bytes(raw, source, what)
    lengths = _non_negative(shape, source, what)
    if prod(lengths) * element.itemsize != len(content):
        raise refusal(source, what, f"has {len(content)} bytes for shape {shown(shape)} of {element.name}")
    flat = np.frombuffer(content, dtype=element)
    return flat.reshape(lengths[::-1]).T if order == "F" else flat.reshape(lengths)


def read_integer(value: object, source: str, what: str) -> int:
    """An integer that was pickled by Python or by NumPy.

    Raises:
        DataError: If `value` is neither.
    """
    if type(value) is int:
        return value
    match value:
        case Record(name, (dtype, raw), None) if name in _SCALAR:
            element, content = _read_dtype(dtype, source, what), _read_bytes(raw, source, what)
            if element.kind == "i" and len(content) == element.itemsize:
                return int(np.frombuffer(content, dtype=element)[0])
    raise refusal(source, what, f"is {shown(value)}, not an integer")


def read_diagonal(value: object, source: str, what: str) -> NDArray[Any]:
    """The diagonal of a square SciPy matrix that has nothing outside of it, as scikit-learn stored idf.

    Returns:
        Array of shape (n,).

    Raises:
        DataError: If `value` is no CSR or DIA matrix, or has an entry beside its diagonal.
    """
    if not isinstance(value, Record) or value.name not in _CSR | _DIA or not isinstance(value.state, dict):
        raise refusal(source, what, f"is {shown(value)}, not a SciPy matrix")
    state = value.state
    parts = ("data", "indices", "indptr") if value.name in _CSR else ("data", "offsets")
    data, *places = (read_array(state.get(part), source, f"{what}.{part}") for part in parts)
    size = data.size
    if value.name in _CSR:
        wanted, data_shape = [np.arange(size), np.arange(size + 1)], [size]
    else:
        wanted, data_shape = [np.arange(1)], [1, size]
    is_diagonal = list(data.shape) == data_shape and all(map(np.array_equal, places, wanted))
    if not is_diagonal or _non_negative(state.get("_shape"), source, what) != (size, size):
        raise refusal(source, what, "is not a square diagonal matrix")
    return data.reshape(size)


def read_tensor(value: object, source: str, what: str) -> tuple[NDArray[Any], str]:
    """The torch tensor that a record describes, wherever it was when it was saved.

    Returns:
        Array of float32 or float64, and torch's name of the device that the tensor was on.

    Raises:
        DataError: If the record describes no tensor of floats, or its bytes are not those that it announces.
    """
    match value:
        case Record(name, (Record(storage, (blob,), None), offset, shape, strides, _, *_), None) if (
            name == _TENSOR and storage == _STORAGE
        ):
            content, device = _read_storage(_read_bytes(blob, source, what), f"{source}, storage of {what}")
        case _:
            raise refusal(source, what, f"is {shown(value)}, not a torch tensor")
    (first,) = _non_negative((offset,), source, what)
    lengths, steps = _non_negative(shape, source, what), _non_negative(strides, source, what)
    # Only dense tensors: then what is copied below is no larger than the file. A length of 0 or 1 steps nowhere.
    order = (
        sorted(range(len(lengths)), key=lambda axis: steps[axis], reverse=True) if len(steps) == len(lengths) else []
    )
    dense = [prod(lengths[later] for later in order[place + 1 :]) for place in range(len(order))]
    is_dense = len(order) == len(lengths) and all(
        steps[axis] == step or lengths[axis] <= 1 for axis, step in zip(order, dense, strict=True)
    )
    if not is_dense or first + prod(lengths) > len(content):
        raise refusal(
            source,
            what,
            f"has shape {shown(shape)}, strides {shown(strides)} and offset {shown(offset)} "
            f"in a storage of {len(content)} numbers",
        )
    flat = content[first : first + prod(lengths)]
    return flat.reshape([lengths[axis] for axis in order]).transpose(np.argsort(order)), device


def _read_storage(blob: memoryview, source: str) -> tuple[NDArray[Any], str]:
    """Read a legacy torch file that holds one storage: five pickles, a count, the numbers."""
    if bytes(blob[:2]) == b"PK":
        raise refusal(source, "the tensor", "is a zip archive, which pickle.dump never makes of a tensor")
    names, position, parts = frozenset(_STORAGE_TYPES), 0, []
    for _ in range(5):
        part, position = read_pickle(blob, names, source=source, start=position, persistent_ids=True)
        parts.append(part)
    match parts:
        case [int(magic), int(version), {"little_endian": True}, Record(name, (reference,)), [key]] if (
            magic,
            version,
        ) == (_TORCH_MAGIC, _TORCH_VERSION) and name == PERSISTENT_ID:
            pass
        case _:
            raise refusal(source, "the tensor", "does not begin like a little-endian torch file of version 1001")
    match reference:
        case ("storage", Name() as kind, str(own_key), str(device), int(count), None) if own_key == key:
            element: np.dtype[Any] = _STORAGE_TYPES[kind]
        case _:
            raise refusal(source, "the tensor", f"points to {shown(reference)}, not to its own storage")
    if int.from_bytes(blob[position : position + 8], "little", signed=True) != count:
        raise refusal(source, "the tensor", f"announces {count} numbers, and another count before them")
    content = blob[position + 8 :]
    if count * element.itemsize != len(content):
        raise refusal(
            source, "the tensor", f"announces {count} numbers of {element.name} and holds {len(content)} bytes"
        )
    return np.frombuffer(content, dtype=element), device


def _read_dtype(value: object, source: str, what: str) -> np.dtype[Any]:
    match value:
        case Record(name, (str(code), *_), (_, str(byte_order), None, None, None, *_)) if (
            name == _DTYPE and code in _ELEMENT_TYPES and byte_order in ("<", ">")
        ):
            return np.dtype(byte_order + code)
        case Record(name, (code, *_)) if name == _DTYPE:
            raise refusal(
                source, what, f"has elements of type {shown(code)}, not one of {', '.join(sorted(_ELEMENT_TYPES))}"
            )
    raise refusal(source, what, f"has elements of type {shown(value)}, not a numpy.dtype")


def _read_bytes(value: object, source: str, what: str) -> memoryview:
    match value:
        case memoryview():
            return value
        case Record(name, (str(text), "latin1"), None) if name == _ENCODE:
            try:
                return memoryview(text.encode("latin-1"))
            except UnicodeEncodeError:
                raise refusal(source, what, "has bytes above 255") from None
    raise refusal(source, what, f"has {shown(value)} for its bytes")


def _non_negative(value: object, source: str, what: str) -> tuple[int, ...]:
    """A shape, strides or an offset: at most two numbers of at most 63 bits."""
    if isinstance(value, tuple) and len(value) <= 2 and all(type(n) is int and 0 <= n < 2**63 for n in value):
        return value
    raise refusal(source, what, f"has {shown(value)} where a shape, strides or an offset belong")
