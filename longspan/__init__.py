"""longspan: training on sequences of hundreds of thousands to millions of tokens."""

__version__ = "0.1.0"
