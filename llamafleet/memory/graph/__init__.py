"""llama.cpp's graph of a full batch, built from a GGUF header, and the bytes of its compute buffers."""
