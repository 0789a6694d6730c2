"""What concerns several hosts: their gateway."""
