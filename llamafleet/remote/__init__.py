"""Programs that run on the hosts: builtin types in, JSON on stdout, nothing of ours imported."""
