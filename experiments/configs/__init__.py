"""Configs: each is a lab note with the command, the hardware and the expected result."""
