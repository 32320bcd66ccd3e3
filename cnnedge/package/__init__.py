"""A bundle in the form that an app or a server wants: an ONNX file, a zip file, Triton models."""
