"""The gradient worker: loss, gradient and statistics of its part of every batch."""
