"""What a release of llama.cpp changes for this project: one module for each kind of change (see bench/adopt.py)."""
