"""torch-cuda: networks on a GPU without TensorRT, run node by node by torch.

For machines TensorRT does not serve, and a second opinion on its numbers. Apart
from `rtfocus.training` the only place that imports torch.
"""
