"""GPU network: an execution context with the buffers it reads and writes."""

from collections.abc import Mapping

from rtfocus.processing.gpu.seam import GpuContext, GpuEngine, Shape
from rtfocus.processing.gpu.work import DeviceArray, DeviceMemory, Work


class BoundNetwork:
    """One inference in flight: no other shares its buffers.

    Parameters
    ----------
    memory
        Where buffers lie that are not given.
    engine
        That the context is of.
    shapes
        Of every input.
    given
        Buffers the caller has already, by tensor.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        engine: GpuEngine,
        shapes: Mapping[str, Shape],
        given: Mapping[str, DeviceArray] | None = None,
    ) -> None:
        every = {**shapes, **engine.output_shapes(shapes)}
        known = given or {}
        self.buffers: dict[str, DeviceArray] = {
            name: known.get(name)
            or memory.allocate(
                shape, engine.tensors[name].dtype, f"tensor '{name}' of {engine.name}"
            )
            for name, shape in every.items()
        }
        """By tensor, inputs and outputs."""
        self._context: GpuContext = engine.open_context()
        self._context.bind(
            {name: buffer.address for name, buffer in self.buffers.items()}, shapes
        )

    def enqueue(self, work: Work) -> None:
        """Enqueue the inference."""
        self._context.enqueue(work.handle)

    def why_not_capturable(self, work: Work) -> str | None:
        """Return why it may not be recorded in a CUDA graph; None: it may."""
        return self._context.why_not_capturable(work.handle)

    def close(self) -> None:
        """Free the context."""
        self._context.close()
