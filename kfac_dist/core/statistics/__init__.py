"""Curvature statistics of a part of a batch: sums over cases of the factors of every block."""
