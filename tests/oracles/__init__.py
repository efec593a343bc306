"""Slow, plain reference versions of what the library computes, for the tests to compare with."""
