"""`python -m reconciler` is `agent-reconciler`."""

from reconciler.cli import main

main()
