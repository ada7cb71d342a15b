"""Training steps and optimizer state over several devices."""
