"""What is learned: models, losses and metrics."""
