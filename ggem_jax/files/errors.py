"""Errors of reading weights; each message is one sentence that names the file."""


class UnreadableWeights(ValueError):
    """A file that cannot be read: absent, truncated, damaged, or of another format."""


class UnsafePickle(UnreadableWeights):
    """A pickle that asks for more than plain data.

    The message names what it asks for. No part of it is run.
    """


class MismatchedWeights(ValueError):
    """Weights that do not fit the network.

    The message lists every missing, surplus and wrongly shaped parameter.
    """


class AmbiguousWeights(MismatchedWeights):
    """Weights that fit several networks, which compute different things.

    The message says what is not known and what settles it.
    """
