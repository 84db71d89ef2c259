"""One script for a GPU that is there for minutes: right first, then fast. `python -m tests.gpu`, or `make gpu`."""
