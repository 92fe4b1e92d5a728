"""What `experiments.classify` is made of; nothing here needs JAX where the network is ONNX."""
