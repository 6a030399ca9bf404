"""Models that see tokens, labels and `seq`, and what is applied to them from outside."""
