"""`python -m trimtab`, and so `accelerate launch -m trimtab train ...`."""

from trimtab.cli import main

main()
