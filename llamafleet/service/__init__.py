"""What is installed on a host: command line, record, units, and what must change."""
