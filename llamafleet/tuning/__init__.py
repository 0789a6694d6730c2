"""What to measure next, and what a measurement is worth."""
