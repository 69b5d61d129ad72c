"""The few functions of libcuda that load a compiled kernel and launch it, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARY = "libcuda.so.1"

# Numbers of cuda.h.
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76
_MAX_DYNAMIC_SHARED_BYTES = 8
_FLOAT16, _BFLOAT16 = 6, 9
_SWIZZLE_128B, _PROMOTE_128B = 3, 2

_Pointer = ctypes.c_void_p
_SIGNATURES: dict[str, tuple[object, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDriverGetVersion": (_Pointer,),
    "cuGetErrorString": (ctypes.c_int, _Pointer),
    "cuDeviceGet": (_Pointer, ctypes.c_int),
    "cuDeviceGetAttribute": (_Pointer, ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_Pointer, ctypes.c_int),
    "cuCtxGetCurrent": (_Pointer,),
    "cuCtxPushCurrent_v2": (_Pointer,),
    "cuCtxPopCurrent_v2": (_Pointer,),
    "cuModuleLoadData": (_Pointer, ctypes.c_char_p),
    "cuModuleGetFunction": (_Pointer, _Pointer, ctypes.c_char_p),
    "cuFuncSetAttribute": (_Pointer, ctypes.c_int, ctypes.c_int),
    "cuTensorMapEncodeTiled": (
        *(_Pointer, ctypes.c_int, ctypes.c_uint32, _Pointer, _Pointer, _Pointer, _Pointer, _Pointer),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ),
    "cuLaunchKernel": (_Pointer, *[ctypes.c_uint] * 7, _Pointer, _Pointer, _Pointer),
}


class DriverError(RuntimeError):
    """A function of the CUDA driver failed; the sentence names it and gives the driver's own words."""


class Driver:
    """libcuda, initialised.

    Args:
        library: name or path of the shared library.

    Raises:
        OSError: it cannot be loaded.
        DriverError: it lacks a function, or finds no device.
    """

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        for name, arguments in _SIGNATURES.items():
            try:
                function = getattr(self._library, name)
            except AttributeError:
                raise DriverError(
                    f"{library} has no {name}, so it is older than CUDA 12; update the NVIDIA driver."
                ) from None
            function.argtypes, function.restype = arguments, ctypes.c_int
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: object) -> None:
        """Call a function.

        Raises:
            DriverError: it returns anything but success.
        """
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise DriverError(f"{name} failed: {self._describe(code)} (CUDA error {code}).")

    def _describe(self, code: int) -> str:
        text = ctypes.c_char_p()
        if self._library.cuGetErrorString(code, ctypes.byref(text)) != 0 or text.value is None:
            return "an error that this driver has no words for"
        return text.value.decode(errors="replace")

    def version(self) -> int:
        """Newest CUDA version the driver supports, 1000 * major + 10 * minor."""
        found = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(found))
        return found.value


class Device:
    """One GPU: what it is, and its primary context, the one torch uses.

    Args:
        driver: the driver.
        ordinal: torch's index of the device, which is the driver's.

    Raises:
        DriverError: there is no such device.
    """

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self.driver = driver
        handle = ctypes.c_int()
        driver.call("cuDeviceGet", ctypes.byref(handle), ordinal)
        self._handle = handle.value
        self.multiprocessors = self._attribute(_MULTIPROCESSORS)
        self.capability = (self._attribute(_MAJOR), self._attribute(_MINOR))
        self._context: ctypes.c_void_p | None = None
        self._lock = threading.Lock()

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self.driver.call("cuDeviceGetAttribute", ctypes.byref(value), number, self._handle)
        return value.value

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the primary context current in this thread, where torch may not have done anything yet."""
        with self._lock:
            if self._context is None:  # kept to the end of the process, as torch keeps it
                context = ctypes.c_void_p()
                self.driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._handle)
                self._context = context
        current = ctypes.c_void_p()
        self.driver.call("cuCtxGetCurrent", ctypes.byref(current))
        if current.value == self._context.value:
            yield
            return
        self.driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self.driver.call("cuCtxPopCurrent_v2", ctypes.byref(current))


class Kernel:
    """A compiled kernel on one device.

    Args:
        device: where it runs.
        image: the cubin.
        name: of the function.
        threads: of a CTA.
        shared_bytes: dynamic shared memory of a CTA.

    Raises:
        DriverError: the driver refuses the image, or it has no such function.
    """

    def __init__(self, device: Device, image: bytes, name: str, threads: int, shared_bytes: int) -> None:
        self.device, self.threads, self.shared_bytes = device, threads, shared_bytes
        call = device.driver.call
        module = ctypes.c_void_p()  # never unloaded: a launch may still be running
        self._function = ctypes.c_void_p()
        with device.active():
            call("cuModuleLoadData", ctypes.byref(module), image)
            call("cuModuleGetFunction", ctypes.byref(self._function), module, name.encode())
            call("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes)

    def launch(self, ctas: int, stream: int, parameters: ctypes.Array[ctypes.c_void_p]) -> None:
        """Launch on a stream; the driver copies what `parameters` point to before it returns.

        Raises:
            DriverError: the launch is refused.
        """
        with self.device.active():
            self.device.driver.call(
                *("cuLaunchKernel", self._function, ctas, 1, 1, self.threads, 1, 1, self.shared_bytes),
                *(ctypes.c_void_p(stream), parameters, None),
            )


class TensorMap:
    """A tensor map of a `[batch, heads, tokens, 64]` tensor, read in boxes of 64 channels x some tokens.

    Args:
        driver: the driver.
        tokens: of a box.
    """

    def __init__(self, driver: Driver, tokens: int) -> None:
        self._driver = driver
        self._room = ctypes.create_string_buffer(128 + 64)
        start = ctypes.addressof(self._room)
        self.address = start + -start % 64
        self._sizes = (ctypes.c_uint64 * 4)()
        self._strides = (ctypes.c_uint64 * 3)()
        self._box = (ctypes.c_uint32 * 4)(64, tokens, 1, 1)
        self._steps = (ctypes.c_uint32 * 4)(1, 1, 1, 1)

    def encode(self, address: int, half: bool, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        """Describe a tensor of 16-bit values, the strides in elements; see `loadable` in `launch`.

        Raises:
            DriverError: the driver refuses it.
        """
        self._sizes[:] = [shape[3], shape[2], shape[1], shape[0]]
        # Of a size of one the stride is never used, but must be valid all the same.
        self._strides[:] = [2 * strides[n] if shape[n] > 1 else 128 for n in (2, 1, 0)]
        # fmt: off
        self._driver.call(
            "cuTensorMapEncodeTiled", self.address, _FLOAT16 if half else _BFLOAT16, 4, address, self._sizes,
            self._strides, self._box, self._steps, 0, _SWIZZLE_128B, _PROMOTE_128B, 0,
        )
        # fmt: on


@functools.cache
def driver() -> Driver:
    """The driver of this machine.

    Raises:
        OSError: there is none.
        DriverError: it finds no device.
    """
    return Driver(LIBRARY)


@functools.cache
def device(ordinal: int) -> Device:
    """A device by torch's index.

    Raises:
        OSError: there is no driver.
        DriverError: there is no such device.
    """
    return Device(driver(), ordinal)
