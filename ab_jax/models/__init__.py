"""Networks whose parts (norm, activation, dtype) are arguments; weights are quantized outside."""
