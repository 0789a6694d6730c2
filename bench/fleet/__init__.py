"""A fleet of simulated hosts, and what a run over it costs the operator's machine."""
