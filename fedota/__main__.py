"""`python -m fedota` is the command `fedota`."""

from fedota.cli import main

if __name__ == "__main__":
    main()
