"""Tests of examples.trainer."""
