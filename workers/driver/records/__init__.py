"""What the driver records of a run, and the metrics that it serves."""
