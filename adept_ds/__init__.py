"""adept-ds: domain adaptation of language models by adaptive layer expansion, on DeepSpeed."""

__version__ = "0.1.0"
