"""`python -m bevatron` is the command `bevatron`."""

from bevatron.cli.main import main

if __name__ == "__main__":
    main()
