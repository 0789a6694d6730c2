"""The choice of a placement for each model of a host."""
