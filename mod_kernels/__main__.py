"""``python -m mod_kernels``: the command line without the script on the path."""

from .cli import main

main()
