"""What a user can mend; printed as one line, without a traceback."""


class UserError(Exception):
    """A wrong config, file or folder: says what was found, what is needed and what to do."""
