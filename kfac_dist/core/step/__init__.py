"""From directions to an update: step size, momentum, damping, gamma, averaging."""
