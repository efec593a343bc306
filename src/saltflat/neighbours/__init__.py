"""The neighbours of AWP: one paper a file, each a few lines on the same balls and loops."""
