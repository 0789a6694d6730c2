"""The command `llamafleet`."""
