"""The optimizers for Python code: `KFAC`, and `KFACPreconditioner` for your own training loop."""
