"""`python -m pos_gateway.cli`: the same as the console script."""

from pos_gateway.cli.main import main

main()
