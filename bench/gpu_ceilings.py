"""GPU ceilings: what a card's copies and matrix units do at best, and is asked for.

The first is measured on the card, the second counted in the network's graph.
"""

from typing import Any

import numpy as np

from rtfocus.engines.card import verified_file
from rtfocus.engines.registry import FoundEngine
from rtfocus.evaluation.contenders import multiply_adds_per_pixel
from rtfocus.processing.gpu.cuda.compiler import compile_for
from rtfocus.processing.gpu.cuda.driver import current_context, import_driver
from rtfocus.processing.gpu.cuda.stream import PinnedMemory
from rtfocus.runtimes.gpu import Gpu

COPY_BYTES = 1 << 28
ROUNDS = 10
LOOPS = 4096
CHAINS = 8
"""Independent products per warp, so that none waits for the one before."""
FLOP_PER_PRODUCT = 2 * 16 * 8 * 8

# m16n8k8 on halves, sums in float32: the shape every card from 7.5 on has. Hopper's
# own wgmma is about half as fast again: there the ceiling is that of mma.sync.
MATRIX_KERNEL = """
extern "C" __global__ void multiply(float* out, int loops) {
  unsigned a0 = threadIdx.x, a1 = threadIdx.x + 1, b = threadIdx.x + 2;
  float c[CHAINS][4] = {};
  for (int i = 0; i < loops; ++i)
    for (int k = 0; k < CHAINS; ++k)
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
          "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
          : "+f"(c[k][0]), "+f"(c[k][1]), "+f"(c[k][2]), "+f"(c[k][3])
          : "r"(a0), "r"(a1), "r"(b));
  float total = 0;
  for (int k = 0; k < CHAINS; ++k)
    for (int j = 0; j < 4; ++j) total += c[k][j];
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}
""".replace("CHAINS", str(CHAINS))


def ceilings(device: Gpu) -> dict[str, Any]:
    """Measure copies in, out, both at once and within the device, and products."""
    cuda = import_driver()
    with current_context(device.gpu_index):
        pinned = PinnedMemory()
        try:
            return _copies(cuda, pinned) | {
                "matrix_tflop_s": _products(cuda, device),
                "matrix_kernel": "mma.sync m16n8k8, float16 in, float32 sums",
            }
        finally:
            pinned.release()


def _copies(cuda: Any, pinned: PinnedMemory) -> dict[str, float]:
    host = [pinned.empty((COPY_BYTES,), np.uint8) for _ in range(2)]
    for memory in host:
        memory.fill(1)
    device = [cuda.mem_alloc(COPY_BYTES) for _ in range(3)]
    first, second = cuda.Stream(1), cuda.Stream(1)

    def copy_in(stream: Any) -> None:
        cuda.memcpy_htod_async(int(device[0]), host[0], stream)

    def copy_out(stream: Any) -> None:
        cuda.memcpy_dtoh_async(host[1], int(device[1]), stream)

    def both() -> None:
        copy_in(first)
        copy_out(second)
        mark = cuda.Event()
        mark.record(second)
        first.wait_for_event(mark)

    def inside() -> None:
        cuda.memcpy_dtod_async(int(device[2]), int(device[0]), COPY_BYTES, first)

    rate = COPY_BYTES / 1e6
    found = {
        "copy_in_gb_s": rate / _median_ms(cuda, first, lambda: copy_in(first)),
        "copy_out_gb_s": rate / _median_ms(cuda, first, lambda: copy_out(first)),
        "both_ways_gb_s": 2 * rate / _median_ms(cuda, first, both),
        # Read and written.
        "device_memory_gb_s": 2 * rate / _median_ms(cuda, first, inside),
    }
    for memory in device:
        memory.free()
    return found


def _products(cuda: Any, device: Gpu) -> float:
    code = compile_for(device.compute_capability, MATRIX_KERNEL)
    function = cuda.module_from_buffer(code).get_function("multiply")
    function.prepare("Pi")
    units = cuda.Device(device.gpu_index).multiprocessor_count
    blocks, threads = 8 * units, 256
    out = cuda.mem_alloc(4 * blocks * threads)
    stream = cuda.Stream(1)

    def run() -> None:
        function.prepared_async_call(
            (blocks, 1), (threads, 1, 1), stream, int(out), LOOPS
        )

    milliseconds = _median_ms(cuda, stream, run)
    out.free()
    products = blocks * (threads // 32) * LOOPS * CHAINS
    return float(products * FLOP_PER_PRODUCT / milliseconds / 1e9)


def _median_ms(cuda: Any, stream: Any, work: Any) -> float:
    times = []
    for number in range(ROUNDS + 2):
        begin, end = cuda.Event(), cuda.Event()
        begin.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        if number >= 2:  # warm
            times.append(end.time_since(begin))
    return max(float(np.median(times)), 1e-6)


_PIXELS = 512
"""Side of the frame that is counted on, about."""


def network_multiply_adds(found: FoundEngine) -> float | None:
    """Return the multiply-adds of a network per pixel of a frame.

    None: it is no network, or neither OpenVINO nor torch and onnx are there to count.
    """
    tiles, counted = found.card.input, multiply_adds_per_pixel(found)
    if tiles is None:
        return counted
    if counted is None:
        try:
            counted = count_in_torch(found)
        except ImportError:
            return None
    # A frame as one tile spends nothing on halos.
    return counted * (1 - 2 * tiles.halo_px / tiles.tile_px * tiles.any_size) ** 2


def count_in_torch(found: FoundEngine) -> float:
    """Count as `rtfocus.evaluation.contenders` does, by torch and without pixels."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from rtfocus.runtimes.torch_engine import TorchNetwork

    card, place = found.card, torch.device("meta")
    assert card.input is not None
    side = owned = round(_PIXELS / card.input.multiple_px) * card.input.multiple_px
    if card.kind == "restorer":
        side = card.input.tile_px
        owned = side - 2 * card.input.halo_px
    shapes: dict[str, tuple[int, ...]] = {
        card.input.name: (1, card.input.channels, side, side)
    }
    if card.condition is not None:
        shapes[card.condition.name] = (1, len(card.condition.entries))
    network = TorchNetwork(found.name, verified_file(found.folder, card), place)
    with FlopCounterMode(display=False) as counter:
        network.run({n: torch.empty(s, device=place) for n, s in shapes.items()})
    return float(counter.get_total_flops()) / 2 / owned**2
