"""What to compile, with what, and by which name the result is known."""
