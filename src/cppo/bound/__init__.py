"""The theorem, run: its statements verified by enumeration, and what its constants are worth at a setting."""
