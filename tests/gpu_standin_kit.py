"""A machine with a GPU that is none: libcuda and cuFFT on host memory.

The stand-in has to be loaded before PyCUDA is imported and stays for the process, so
what uses it runs in a process of its own, see ``tests/gpu/test_gpu_standin.py``.
"""

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
from gpu_host_kit import STANDIN, build, compiler, kernel_library, view

from rtfocus.processing.gpu.work import DeviceArray
from rtfocus.runtimes.gpu import GpuBackend, IoTensor

NETWORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def why_impossible() -> str | None:
    """Return why this machine cannot run the stand-in; None: it can."""
    if importlib.util.find_spec("pycuda") is None:
        return "PyCUDA is not installed"
    missing = [tool for tool in ("g++", "nm") if shutil.which(tool) is None]
    return f"needs {', '.join(missing)}" if missing else None


def build_standin(folder: Path) -> dict[str, Path]:
    """Compile driver, transforms and kernels into a folder."""
    assert compiler()
    source = (STANDIN / "libcuda.cpp").read_text("utf-8")
    rest = sorted(_wanted_by_pycuda() - set(_defined(source)))
    stubs = "".join(f"API int {name}() {{ return STUB; }}\n" for name in rest)
    driver = build(
        source + stubs, folder / "libcuda.so.1", "-Wl,-soname,libcuda.so.1", "-ldl"
    )
    transforms = (STANDIN / "libcufft.cpp").read_text("utf-8")
    return {
        "driver": driver,
        "cufft": build(transforms, folder / "libcufft.so", str(driver)),
        "kernels": kernel_library(folder),
    }


def _wanted_by_pycuda() -> set[str]:
    found = importlib.util.find_spec("pycuda").submodule_search_locations[0]
    module = next(Path(found).glob("_driver*.so"))
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(module)],
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    return {name for name in names if name.startswith("cu")}


def _defined(source: str) -> list[str]:
    lines = [line for line in source.splitlines() if line.startswith("API ")]
    return [line.partition("(")[0].split()[-1].lstrip("*") for line in lines]


class HostContext:
    """Implements `GpuContext`: ONNX Runtime, put on the stand-in's streams."""

    def __init__(self, session, driver, tensors) -> None:
        self._session = session
        self._driver = driver
        self._tensors = tensors
        self._functions = []
        driver.standin_count(ctypes.c_long(1))

    def bind(self, buffers, input_shapes, *, input_consumed_event=0):
        feeds = {
            name: view(DeviceArray(buffers[name], shape, np.dtype(np.float32)))
            for name, shape in input_shapes.items()
        }
        found = self._session.run(None, feeds)
        outputs = {
            output.name: view(
                DeviceArray(buffers[output.name], array.shape, array.dtype)
            )
            for output, array in zip(self._session.get_outputs(), found, strict=True)
        }

        def run(_):
            for name, array in zip(
                outputs, self._session.run(list(outputs), feeds), strict=True
            ):
                outputs[name][...] = array

        # Kept for good: a recording may hold it.
        self._functions.append(NETWORK(run))

    def enqueue(self, cuda_stream):
        self._driver.cuLaunchHostFunc(
            ctypes.c_void_p(cuda_stream), self._functions[-1], None
        )

    def why_not_capturable(self, cuda_stream):
        return None

    def close(self):
        if self._session is not None:
            self._driver.standin_count(ctypes.c_long(-1))
        self._session = None


class HostEngine:
    """Implements `GpuEngine` with ONNX Runtime."""

    backend = "host"
    context_bytes = 0

    def __init__(self, request, driver) -> None:
        self.name = request.name
        self.precision = request.precision
        self.inputs = request.inputs
        self._driver = driver
        driver.standin_count(ctypes.c_long(1))
        self._session = onnxruntime.InferenceSession(
            str(request.model), providers=["CPUExecutionProvider"]
        )
        single = np.dtype(np.float32)
        inputs = [i.name for i in self._session.get_inputs()]
        outputs = [o.name for o in self._session.get_outputs()]
        self.tensors = {
            name: IoTensor(name, single, is_input=name in inputs)
            for name in (*inputs, *outputs)
        }

    def output_shapes(self, input_shapes):
        blank = {n: np.zeros(s, np.float32) for n, s in input_shapes.items()}
        found = self._session.run(None, blank)
        names = [output.name for output in self._session.get_outputs()]
        return {n: a.shape for n, a in zip(names, found, strict=True)}

    def open_context(self):
        return HostContext(self._session, self._driver, self.tensors)

    def close(self):
        if self._session is not None:
            self._driver.standin_count(ctypes.c_long(-1))
        self._session = None


def pretend(driver, transforms, patch) -> None:
    """Make rtfocus in this process see the stand-in, with a `setattr` that may undo."""
    from rtfocus.processing.gpu import device
    from rtfocus.processing.gpu.cuda import driver as cuda_driver
    from rtfocus.runtimes import gpu

    patch(gpu, "GPU_BACKENDS", (host_backend(driver),))
    patch(cuda_driver, "load_library", lambda library: transforms)
    # The stand-in loads the kernels from a library of its own.
    patch(device, "compiled_kernels", lambda capability: b"kernels")
    patch(device, "why_driver_too_old", lambda release: None)


def host_backend(driver) -> GpuBackend:
    """Return the backend of a machine without TensorRT, torch or a GPU."""
    return GpuBackend(
        "host", lambda device: None, lambda request, device: HostEngine(request, driver)
    )
