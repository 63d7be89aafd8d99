"""`python -m embkit …` and `torchrun -m embkit …` are the same as `embkit …`."""

from embkit.cli import main

main()
