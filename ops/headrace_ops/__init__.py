"""The servers that headrace runs against, as processes or as containers."""
