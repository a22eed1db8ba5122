"""The optimizers as one uses them from Python: `KFAC`, and `KFACPreconditioner` for one's own training loop."""
