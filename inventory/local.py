"""This machine. Run as root, or with --sudo."""

hosts = [
    (
        "@local",
        {
            "models": [
                {
                    "name": "gpt-oss-20b",
                    "source": "hf:ggml-org/gpt-oss-20b-GGUF/gpt-oss-20b-mxfp4.gguf",
                    "port": 8080,
                },
            ],
        },
    ),
]
