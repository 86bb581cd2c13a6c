"""Files mapped into memory and not kept open: a data set has more shards than a process may have descriptors.

`mmap.mmap` holds a descriptor for as long as the mapping lives (until Python 3.13, whose `trackfd` ends that).
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
    """All bytes of an open file, to be read only. The descriptor may be closed then.

    It is unmapped when the last view, or array over it, is gone. Raises OSError.
    """
    size = os.fstat(descriptor).st_size
    if size == 0:
        return memoryview(b"")
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    array = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(array, _libc.munmap, address, size).atexit = False  # the system unmaps what is left
    return memoryview(array).cast("B").toreadonly()
