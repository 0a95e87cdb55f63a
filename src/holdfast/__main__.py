"""`python -m holdfast` is the command line."""

from holdfast.edge.cli import main

main()
