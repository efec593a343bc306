"""What writes docs/reference/: `python -m docs.generate`."""
