"""The decoder in C for CPUs, compiled on the machine that runs it (docs/onnx.md)."""
