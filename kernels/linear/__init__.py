"""Linear attention on one rank: the definition (`naive`) and the chunked form used everywhere (`chunked`)."""
