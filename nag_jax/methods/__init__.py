"""Optimizers: one method a file, named as it is called."""
