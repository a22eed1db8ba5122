"""What the driver writes down of a run, and the metrics it serves."""
