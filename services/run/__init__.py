"""The supervisor behind `make run`."""
