"""What can go wrong, as a tree.

    LimnerError
    └── UserError            the user's mistake: exit code 2, one sentence with what to do about it
        ├── ConfigError      a setting, a preset or a configuration file
        ├── DataError        a source, a dataset folder or a picture
        ├── ModelError       a model folder, a component or a hub
        └── RunError         a run folder: another configuration, a damaged checkpoint, a NaN

Broken invariants of our own are `assert`, and reach the user as a traceback with exit code 1.
"""


class LimnerError(Exception):
    """Anything Limner raises on purpose."""


class UserError(LimnerError):
    """A mistake that the user can mend; the message is one sentence that says what is wrong and what to do."""


class ConfigError(UserError):
    """A setting, preset or configuration file that does not hold together."""


class DataError(UserError):
    """A source, dataset folder or picture that can't be read as what it was given for."""


class ModelError(UserError):
    """A model that can't be found, fetched or used for what was asked."""


class RunError(UserError):
    """A run folder that can't be started, resumed or finished."""
