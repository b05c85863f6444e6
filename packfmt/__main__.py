"""`python -m packfmt` is the command line."""

from packfmt.cli import main

main()
