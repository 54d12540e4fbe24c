"""What stands in a quantized network: layers, their weights, what is done to their inputs."""
