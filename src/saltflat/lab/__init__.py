"""The laboratory: configs, run folders, reports, and the command line. Nothing below imports it."""
