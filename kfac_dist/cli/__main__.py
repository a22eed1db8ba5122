"""`python -m kfac_dist.cli`: the command line where its script is not on the PATH."""

from kfac_dist.cli import main

main()
