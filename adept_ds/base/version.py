"""The version of adept-ds."""

__version__ = "0.1.0"
