"""Saltflat inside other people's training loops: one file a framework, each of which calls `perturbed`.

A framework is imported by its own file alone, so none is needed for another's.
"""
