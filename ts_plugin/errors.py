"""How a command ends that cannot do what was asked."""


class CommandError(Exception):
    """The command cannot do what was asked; the message is the one line that the user sees. Its exit status is 1."""


class InputError(CommandError):
    """What was asked for makes no sense: a wrong option, or a file that is not what it should be. Exit status 2."""
