"""`python -m cli` is the command `beeline`."""

from cli.main import main

main()
