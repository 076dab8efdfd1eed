"""cuFFT: Fourier transforms on a CUDA stream.

The named dependency of the classical restorations on a GPU: package
``nvidia-cufft``, called through ctypes.
"""

import ctypes

from rtfocus.errors import EngineError
from rtfocus.processing.gpu.cuda.driver import CUFFT, OutOfGpuMemoryError, load_library
from rtfocus.processing.gpu.work import DeviceArray, Work

_REAL_TO_COMPLEX = 0x2A
_COMPLEX_TO_REAL = 0x2C
_OUT_OF_MEMORY = 2
_NAMES = {
    1: "invalid plan",
    2: "no memory",
    3: "invalid type",
    4: "invalid value",
    5: "internal error",
    6: "execution failed",
    7: "set-up failed",
    8: "invalid size",
}


class CudaTransforms:
    """Implements `rtfocus.processing.gpu.work.Transforms` with cuFFT.

    Parameters
    ----------
    shape
        Height and width of the images.

    Raises
    ------
    EngineError
        If cuFFT is missing or cannot plan this shape.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._library = load_library(CUFFT)
        self._plans = [
            self._plan(kind) for kind in (_REAL_TO_COMPLEX, _COMPLEX_TO_REAL)
        ]

    def forward(self, work: Work, image: DeviceArray, spectrum: DeviceArray) -> None:
        """Enqueue image -> half spectrum."""
        self._execute("cufftExecR2C", self._plans[0], work, image, spectrum)

    def inverse(self, work: Work, spectrum: DeviceArray, image: DeviceArray) -> None:
        """Enqueue half spectrum -> image, times height * width; spoils `spectrum`."""
        self._execute("cufftExecC2R", self._plans[1], work, spectrum, image)

    def close(self) -> None:
        """Free plans and their work space."""
        for plan in self._plans:
            self._library.cufftDestroy(plan)
        self._plans = []

    def _plan(self, kind: int) -> ctypes.c_int:
        plan = ctypes.c_int()
        status = self._library.cufftPlan2d(ctypes.byref(plan), *self.shape, kind)
        self._check(status, "planning")
        return plan

    def _execute(
        self,
        function: str,
        plan: ctypes.c_int,
        work: Work,
        source: DeviceArray,
        target: DeviceArray,
    ) -> None:
        self._check(
            self._library.cufftSetStream(plan, ctypes.c_void_p(work.handle)), "set-up"
        )
        status = self._library[function](
            plan, ctypes.c_void_p(source.address), ctypes.c_void_p(target.address)
        )
        self._check(status, function)

    def _check(self, status: int, what: str) -> None:
        if not status:
            return
        reason = _NAMES.get(status, f"error {status}")
        height, width = self.shape
        msg = f"cuFFT {what} for {height} x {width} px: {reason}"
        if status == _OUT_OF_MEMORY:
            msg += "; lower processing.gpu.frames_in_flight"
            raise OutOfGpuMemoryError(msg)
        raise EngineError(msg)
