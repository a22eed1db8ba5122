"""A run's logs as one stream of lines that can be read from any position, also after the run."""

from kfac_dist.service.logs.cursor import LogCursor
from kfac_dist.service.logs.files import LogFilter
from kfac_dist.service.logs.reader import read_lines

__all__ = ["LogCursor", "LogFilter", "read_lines"]
