"""`python -m saltflat` is `saltflat`."""

from saltflat.lab.cli import main

main()
