"""Frame restorers: the restorations of whole frames on the device behind one seam."""

from dataclasses import dataclass
from typing import Protocol

from rtfocus.processing.gpu.blending import GpuBlending
from rtfocus.processing.gpu.cells import FrameShape
from rtfocus.processing.gpu.cufft import CudaTransforms
from rtfocus.processing.gpu.gpu_classifier import ClassifierSlot, GpuClassifier
from rtfocus.processing.gpu.gpu_restorer import GpuDepthVariantRestorer
from rtfocus.processing.gpu.work import DeviceArray, Work


@dataclass(frozen=True, slots=True)
class InFlight:
    """What the restoration of one frame reads and writes on the device."""

    signal: DeviceArray
    maps: dict[str, DeviceArray]
    """Of `rtfocus.processing.gpu.frame_maps`."""
    seen: ClassifierSlot
    """Buffers of the network that saw the frame."""
    out: DeviceArray
    """Result, float32, shape of the signal."""


class GpuFrameRestorer(Protocol):
    """Restores the frames of one channel, one after the other on one stream."""

    def enqueue(self, work: Work, frame: InFlight) -> None:
        """Enqueue the restoration of a frame."""
        ...

    def why_not_capturable(self, work: Work) -> str | None:
        """Return why it may not be recorded in a CUDA graph; None: it may."""
        ...

    def close(self) -> None:
        """Free what is not memory."""
        ...


class ClassicalFrames:
    """Depth-variant deconvolution as a `GpuFrameRestorer`.

    Parameters
    ----------
    restorer
        Does the work.
    transforms
        That it uses, closed with it.
    """

    def __init__(
        self, restorer: GpuDepthVariantRestorer, transforms: CudaTransforms
    ) -> None:
        self._restorer = restorer
        self._transforms = transforms

    def why_not_capturable(self, work: Work) -> str | None:
        """Return None: kernels and transforms may be recorded."""
        del work
        return None

    def enqueue(self, work: Work, frame: InFlight) -> None:
        """Enqueue the restoration of a frame."""
        self._restorer.enqueue(work, frame.signal, frame.maps["level"], frame.out)

    def close(self) -> None:
        """Free the transforms."""
        self._transforms.close()


class JointFrames:
    """The restored frame of the joint engine that found the defocus.

    Parameters
    ----------
    classifier
        The joint engine.
    blending
        Montage weights of its tiles.
    frame
        Shape of the signal.
    output
        Tensor that holds the restored frame.
    """

    def __init__(
        self,
        classifier: GpuClassifier,
        blending: GpuBlending,
        frame: FrameShape,
        output: str,
    ) -> None:
        self._classifier = classifier
        self._blending = blending
        self._frame = frame
        self._output = output

    def why_not_capturable(self, work: Work) -> str | None:
        """Return None: kernels may be recorded."""
        del work
        return None

    def enqueue(self, work: Work, frame: InFlight) -> None:
        """Enqueue the blending of what the network restored."""
        restored = frame.seen.network.buffers[self._output]
        self._classifier.tile.join(work, restored, frame.seen.ranges, frame.out)
        self._blending.enqueue_share(
            work,
            frame=self._frame,
            signal=frame.signal,
            restored=frame.out,
            levels=frame.maps["level"],
            out=frame.out,
        )

    def close(self) -> None:
        """Nothing is its own."""
