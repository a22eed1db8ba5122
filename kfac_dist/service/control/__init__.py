"""The control loop, which starts, follows, restarts and ends attempts of jobs on a cluster."""
