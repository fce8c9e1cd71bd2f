"""Errors that are the user's to mend. Imports nothing, so that the command line can catch them cheaply."""


class ConfigurationError(ValueError):
    """
    A setting, an argument or a folder that a run cannot work with. The message is one line: the field, what it got,
    what it wants, what to do. The command line shows that line alone.
    """
