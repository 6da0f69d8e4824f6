"""`python -m adept_ds`: what launchers that start a module call."""

from adept_ds.cli.app import main

if __name__ == "__main__":
    main()
