"""A fleet. Copy to inventory/fleet.py; every setting is explained in group_data/all.py.

A group's settings can also live in inventory/group_data/GROUP.py.
"""

big = [
    ("gpu1.example.net", {"ssh_user": "root"}),
    # An ordinary user who may use sudo without a password works too.
    ("gpu2.example.net", {"ssh_user": "ops", "_sudo": True}),
]

small = [("nuc1.example.net", {"ssh_user": "root"})]

_gpt_oss_120b = {
    "name": "gpt-oss-120b",
    "source": "hf:ggml-org/gpt-oss-120b-GGUF/gpt-oss-120b-mxfp4-00001-of-00003.gguf",
    "port": 8080,
    "context_tokens": 131072,
}
_qwen3_4b = {
    "name": "qwen3-4b",
    "source": "hf:Qwen/Qwen3-4B-GGUF/Qwen3-4B-Q4_K_M.gguf",
    "port": 8080,
    "context_tokens": 16384,
    # Other machines can reach it, so it needs an API key. The file stays on your machine.
    "listen": "0.0.0.0",  # noqa: S104 -- intended, and requests need the key below
    "api_key_file": "~/.config/llamafleet/api-keys",
}

big = [(name, {**data, "models": [_gpt_oss_120b]}) for name, data in big]
small = [(name, {**data, "models": [_qwen3_4b]}) for name, data in small]

# One address for all of them: see docs/gateway.md. Servers must listen where it reaches them.
# gateway = [("gw1.example.net", {"ssh_user": "root", "gateway_listen": "10.0.0.5",
#                                 "gateway_api_key_file": "~/.config/llamafleet/client-keys"})]
# Who watches all of them: see docs/monitoring.md. It may be a host of another group, by its name alone.
# monitoring = ["gw1.example.net"]
