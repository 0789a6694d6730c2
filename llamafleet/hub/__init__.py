"""Sources of models: their files and headers on the Hugging Face Hub or another web server."""
