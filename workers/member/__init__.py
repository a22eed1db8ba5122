"""A member of a job's process group: a gradient worker, a shard of the parameter server, or both."""
