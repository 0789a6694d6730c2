"""A deploy of pyinfra's without any operation: what it costs to connect to the hosts."""
