"""What leaves and enters this machine: user code, run folders in a storage, data sets."""
