"""TensorRT: its libraries, plans and execution contexts."""
