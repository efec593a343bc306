"""The laboratory: configs, run folders, reports and the command line, on top of the library. Nothing below imports it."""
