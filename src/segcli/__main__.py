"""Entry point of `python -m segcli` (and of `torchrun -m segcli`)."""

from segcli.cli import main

if __name__ == "__main__":
    main()
