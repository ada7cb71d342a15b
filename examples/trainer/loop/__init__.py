"""The training loop and its compiled steps."""
