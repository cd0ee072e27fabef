"""What every benchmark shares: hardware, statistics, targets of a bundle, the decode step."""
