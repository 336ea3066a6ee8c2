"""Checkpoints as folders of ONNX graphs (docs/onnx.md).

    checkpoint  ->  collect (tensor by tensor into the data files)  ->  stem, encoder, decoder (graphs)  ->  folder

`manifest` is what a reader of such folders needs; it imports neither torch nor onnx.
"""
