"""Ours against llama-server's own defaults and against flags by hand, on a card that is limited to less memory."""
