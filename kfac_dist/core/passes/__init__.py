"""Passes over a model: what is observed in them, and which derivatives they give."""
