"""One recipe per file; ``default.py`` has every field."""
