"""The data sets by name, one a file."""
