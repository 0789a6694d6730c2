"""llama.cpp's graph of a full batch, built from a header as its source does, and the memory that it takes."""
