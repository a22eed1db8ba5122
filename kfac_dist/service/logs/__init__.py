"""The logs of a run as one stream of lines, from any place in it, during the run and after."""

from kfac_dist.service.logs.cursor import LogCursor
from kfac_dist.service.logs.files import LogFilter
from kfac_dist.service.logs.reader import read_lines

__all__ = ["LogCursor", "LogFilter", "read_lines"]
