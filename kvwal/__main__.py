"""`python -m kvwal` is the command line."""

from kvwal.cli import main

if __name__ == "__main__":
    main()
