"""Stubs generated from `proto/kfac_dist/v1`, by `make proto`; do not edit them."""
