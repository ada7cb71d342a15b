"""The command line and the config: parsing and checks."""
