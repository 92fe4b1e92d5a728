"""A network as a graph of operations, which the exporters of ONNX, LiteRT and integers read."""
