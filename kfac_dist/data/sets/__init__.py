"""The named data sets, one in each file."""
