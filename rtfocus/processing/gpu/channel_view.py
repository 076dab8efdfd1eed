"""Channel view: what has to be known of a channel to set up its work on a GPU."""

from dataclasses import dataclass

from rtfocus.channel import OpticalSystem
from rtfocus.config.model import Config
from rtfocus.config.processor import RestorationConfig
from rtfocus.processing.engines.registry import FoundEngine
from rtfocus.processing.gpu.backends import open_network
from rtfocus.processing.gpu.cells import FrameShape
from rtfocus.processing.gpu.requests import gpu_request
from rtfocus.processing.gpu.seam import GpuDevice, GpuEngine, GpuRequest
from rtfocus.processing.gpu.work import DeviceMemory


@dataclass(frozen=True, slots=True)
class GpuChannelView:
    """A channel, its frames, and the GPU they go to."""

    config: Config
    restoration: RestorationConfig
    optics: OpticalSystem
    shape: tuple[int, ...]
    """Of the frames, (y, x) or (y, x, 3)."""
    quantum: float
    """Step between the camera's values; 0 for float frames."""
    device: GpuDevice
    memory: DeviceMemory
    """Of the series."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames."""
        return self.shape[0], self.shape[1]

    @property
    def frame(self) -> FrameShape:
        """Shape of the signal."""
        return FrameShape.of(self.shape)

    def open_network(self, found: FoundEngine) -> tuple[GpuEngine, GpuRequest]:
        """Load an engine's network on the GPU, and what was asked for.

        Raises
        ------
        EngineError
            If it has no network, or no backend runs it here.
        """
        settings = self.config.processing.gpu
        precision = None if settings.precision == "auto" else settings.precision
        request = gpu_request(
            found,
            self.size,
            precision,
            tf32=settings.tf32,
            cuda_graphs=settings.cuda_graphs,
        )
        return open_network(settings.backend, request, self.device), request


def runs_on(engine: GpuEngine) -> str:
    """Say what a network runs on, e.g. ``tensorrt 10.13.3 fp16``."""
    return f"{engine.backend} {engine.precision}"
