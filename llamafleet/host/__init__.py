"""What a machine is, and what is installed on it."""
