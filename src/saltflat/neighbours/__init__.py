"""The neighbours of AWP, each a few lines on the same balls and loops: one idea a file."""
