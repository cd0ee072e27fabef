"""What the machine does during a run: energy, power, other programs."""
