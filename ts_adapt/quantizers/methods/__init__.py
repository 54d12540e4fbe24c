"""The methods of quantization; by name in `registry`."""
