"""Everything that talks to hosts through pyinfra; what to do is decided in `llamafleet`."""
