"""The gradient worker: computes loss, gradient and statistics of its part of each batch."""
