"""Memory-mapped files without open descriptors: a data set may have more shards than a process may open files.

`mmap.mmap` keeps a descriptor open for the lifetime of the mapping (up to Python 3.12; 3.13 has `trackfd`).
"""

import ctypes
import mmap
import os
import weakref

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def map_file(descriptor: int) -> memoryview:
    """The bytes of an open file, read-only. The descriptor can be closed afterwards.

    The file is unmapped when the last view or array over it is deleted. Raises OSError.
    """
    size = os.fstat(descriptor).st_size
    if size == 0:
        return memoryview(b"")
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    array = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(array, _libc.munmap, address, size).atexit = False  # at exit the system unmaps it
    return memoryview(array).cast("B").toreadonly()
