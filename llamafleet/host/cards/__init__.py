"""The rows of the GPU catalogue, one file for each kind of card; `gpus.py` looks cards up in them."""
