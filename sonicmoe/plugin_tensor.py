"""Paddle tensors in GPU memory that a device plugin has given out, as TVM-FFI takes them: Paddle itself exports tensors
of its own GPU backend only.
"""

import ctypes

_CUDA = 2  # kDLCUDA
_FLOAT, _BFLOAT, _INT, _UINT = 2, 4, 0, 1
_DTYPES = {
    "float32": (_FLOAT, 32),
    "float16": (_FLOAT, 16),
    "bfloat16": (_BFLOAT, 16),
    "int32": (_INT, 32),
    "int64": (_INT, 64),
    "uint8": (_UINT, 8),
}


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

# What consumers hold, by the address of its structure: they call the deleter when they are done.
_exported: dict[int, tuple] = {}


@_Deleter
def _forget(managed):
    _exported.pop(ctypes.addressof(managed.contents), None)


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class PluginTensor:
    """One tensor, on the device of this number, for ``from_dlpack``. It keeps the tensor alive."""

    def __init__(self, tensor, index: int):
        self._tensor, self._index = tensor, index

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, self._index

    def __dlpack__(self, **_):
        tensor = self._tensor
        shape, strides = tensor.shape, tensor.strides
        code, bits = _DTYPES[str(tensor.dtype).rpartition(".")[2]]
        extents, steps = (ctypes.c_int64 * len(shape))(*shape), (ctypes.c_int64 * len(shape))(*strides)
        plain = _DLTensor(tensor.data_ptr(), _CUDA, self._index, len(shape), code, bits, 1, extents, steps, 0)
        managed = _DLManagedTensor(plain, None, _forget)
        _exported[ctypes.addressof(managed)] = managed, extents, steps, tensor
        return _new_capsule(ctypes.addressof(managed), b"dltensor", None)


def exported(value, index: int):
    """Tensors in ``value``, a tuple of tuples, as TVM-FFI takes them; all else as it is."""
    if isinstance(value, tuple):
        return tuple([exported(part, index) for part in value])
    return PluginTensor(value, index) if hasattr(value, "data_ptr") else value


def set_ffi_stream(index: int, stream: int) -> None:
    """What functions of TVM-FFI launch on from now on in this thread. It asks exported tensors for their stream only
    where it got one from another argument before."""
    from tvm_ffi import core  # a GPU machine's package; nothing else here needs it

    core._env_set_current_stream(_CUDA, index, stream)
