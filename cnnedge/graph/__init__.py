"""The ONNX graph in memory: editing it, writing it, and reading off it what it computes in."""
