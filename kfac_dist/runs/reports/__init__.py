"""The page with the curves of a run, made from its records."""
