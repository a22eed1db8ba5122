"""Inverses of the curvature: block-diagonal, block-tridiagonal or EKFAC; damped, kept, applied."""
