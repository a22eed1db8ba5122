"""A process of the group: a gradient worker, a shard of the parameter server, or both."""
