"""What goes wrong with files of weights, each in one sentence that names the file."""


class UnreadableWeights(ValueError):
    """A file that cannot be read: absent, truncated, damaged, or of another format."""


class UnsafePickle(UnreadableWeights):
    """A pickle that asks for more than plain data; the message names what it asks for. Nothing of
    it was run.
    """


class MismatchedWeights(ValueError):
    """Weights that are not those of the network; the message lists every missing, surplus and
    wrongly shaped parameter.
    """
