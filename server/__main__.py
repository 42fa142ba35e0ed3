"""`python -m server` is `kasa serve`."""

from kasa_runtime.cli import main

if __name__ == "__main__":
    import sys

    main(["serve", *sys.argv[1:]])
