"""`python -m kvmlx.cli`."""

from kvmlx.cli import main

main()
