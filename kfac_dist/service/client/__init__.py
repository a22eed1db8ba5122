"""A client of the control plane for Python programs."""

from kfac_dist.service.client.client import Client
from kfac_dist.service.client.streams import LogBatch, LogStream, Update

__all__ = ["Client", "LogBatch", "LogStream", "Update"]
