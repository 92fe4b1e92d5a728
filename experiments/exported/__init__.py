"""What `experiments.classify` is made of; nothing here needs JAX for networks of ONNX or TFLite."""
