"""The version of kfac_dist, in a module of its own so that anybody can ask for it."""

__version__ = "0.1.0"
