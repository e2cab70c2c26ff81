"""`python -m numagraft` is the `numagraft` command."""

from numagraft.cli.main import run

if __name__ == "__main__":
    run()
