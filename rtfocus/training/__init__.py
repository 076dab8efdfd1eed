"""Training: networks, their data, the trainer and the export to ONNX."""
