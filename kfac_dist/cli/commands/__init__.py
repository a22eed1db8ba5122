"""The commands of `kfac-dist`, one verb a file."""
