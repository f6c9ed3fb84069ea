"""`python -m headscope`: the command line, where the script is not on the path."""

from headscope.cli.main import main

if __name__ == "__main__":
    main()
