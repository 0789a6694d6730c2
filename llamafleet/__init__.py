"""Load every box with exactly what it can carry."""
