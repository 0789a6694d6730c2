"""Several hosts as one: in which order they change, by which address they are reached, how they are watched."""
